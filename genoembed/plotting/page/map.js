(() => {
  const at = (id) => document.getElementById(id);
  const content = JSON.parse(at("content").textContent);
  const decoded = (text, Kind) => {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Kind(bytes.buffer);
  };
  const { ids, descriptions } = content;
  const x = decoded(content.x, Float32Array);
  const y = decoded(content.y, Float32Array);
  const lengths = decoded(content.lengths, Float64Array);
  const order = decoded(content.order, Int32Array);
  const columns = content.columns.map((column) => ({
    ...column,
    codes: column.codes && decoded(column.codes, Int16Array),
    textOf: column.textOf && decoded(column.textOf, Int32Array),
    values: column.values && decoded(column.values, Float64Array),
  }));
  const count = (number) => number.toLocaleString("en");
  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };

  const map = at("map");
  const overlay = at("overlay");
  const pen = overlay.getContext("2d");
  const canvas = new PointCanvas(at("points"), x, y);
  const MOST_RINGS = 200; // rings around a few points show them; around thousands they hide everything
  const REACH = 12; // CSS pixels from the pointer to a point that it means
  const SHADES = 256;
  const SLOW_MS = 12;
  const state = {
    column: columns[0], hidden: new Set(), found: [], selected: [], size: content.size, mode: "pan",
    at: -1, // the point with the card
    pinned: false, outline: null, theme: "light", drawn: [], dirty: false,
  };

  // --- values and colors

  const dateText = (days) => {
    const text = new Date(Math.round(days * 86400) * 1000).toISOString().slice(0, 19).replace("T", " ");
    return text.replace(/:00$/, "").replace(/ 00:00$/, "");
  };
  const textOf = (column, i) => {
    if (column.kind === "class") {
      if (column.texts) return column.texts[column.textOf[i]];
      return column.codes[i] < 0 ? "" : column.classes[column.codes[i]];
    }
    if (Number.isNaN(column.values[i])) return "";
    return column.isDate ? dateText(column.values[i]) : String(Number(column.values[i].toPrecision(10)));
  };
  const isClass = (column) => column.kind === "class";
  const codeOf = (column, i) => (isClass(column) ? column.codes[i] : Number.isNaN(column.values[i]) ? -1 : 0);
  const rgb = (color) => [1, 3, 5].map((from) => parseInt(color.slice(from, from + 2), 16));
  const colorsNow = () => content.themes[state.theme];
  const legendColors = (column) => column.colors[state.theme];

  // Which color each point has: a class, or a step of the scale; the one after the last is for no value.
  function shadesOf(column) {
    if (column.shades) return column.shades;
    const last = isClass(column) ? column.classes.length : SHADES;
    const scaled = column.isLog ? Math.log : (value) => value;
    const [low, high] = isClass(column) ? [] : [scaled(column.low), scaled(column.high)];
    column.shades = Uint16Array.from(ids, (_, i) => {
      const code = codeOf(column, i);
      if (code < 0) return last;
      if (isClass(column)) return code;
      const part = (scaled(column.values[i]) - low) / (high - low);
      return Math.round((SHADES - 1) * Math.min(1, Math.max(0, part)));
    });
    return column.shades;
  }

  function paletteOf(column) {
    const { scale, missing } = colorsNow();
    if (isClass(column)) return [...legendColors(column), missing].map(rgb);
    const stops = scale.map(rgb);
    const made = [];
    for (let step = 0; step < SHADES; step++) {
      const place = (step / (SHADES - 1)) * (stops.length - 1);
      const from = Math.min(Math.floor(place), stops.length - 2);
      made.push(stops[from].map((value, part) => Math.round(value + (stops[from + 1][part] - value) * (place - from))));
    }
    return [...made, rgb(missing)];
  }

  // Points that are shown, those of no value and of joined classes first: they lie below.
  function arrange() {
    const column = state.column;
    const layers = [[], [], []];
    const other = column.hasOther ? column.classes.length - 1 : NaN;
    for (const i of order) {
      const code = codeOf(column, i);
      if (!state.hidden.has(code)) layers[code < 0 ? 0 : code === other ? 1 : 2].push(i);
    }
    state.drawn = Int32Array.from(layers.flat());
    state.isShown = new Uint8Array(ids.length);
    for (const i of state.drawn) state.isShown[i] = 1;
    if (state.at >= 0 && !state.isShown[state.at]) hideTip();
    redraw();
  }

  // --- drawing

  const margins = content.keepsScale ? { left: 30, right: 12, top: 8, bottom: 32 }
    : { left: 60, right: 14, top: 8, bottom: 44 };

  function fit() {
    const width = Math.max(20, map.clientWidth - margins.left - margins.right);
    const height = Math.max(20, map.clientHeight - margins.top - margins.bottom);
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const grown = canvas.width ? [width / canvas.width, height / canvas.height] : null;
    canvas.resize(width, height, ratio);
    Object.assign(canvas.canvas.style, {
      left: `${margins.left}px`, top: `${margins.top}px`, width: `${width}px`, height: `${height}px`,
    });
    overlay.width = Math.round(map.clientWidth * ratio);
    overlay.height = Math.round(map.clientHeight * ratio);
    Object.assign(overlay.style, { left: 0, top: 0, width: `${map.clientWidth}px`, height: `${map.clientHeight}px` });
    if (!grown) return showAll();
    canvas.view.perX *= content.keepsScale ? Math.min(...grown) : grown[0];
    canvas.view.perY *= content.keepsScale ? Math.min(...grown) : grown[1];
    redraw();
  }

  const extentOf = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
    return [low, high];
  };
  const extents = [extentOf(x), extentOf(y)];

  function showAll() {
    const [[left, right], [bottom, top]] = extents;
    // a width of nothing: one place, in the middle
    let [perX, perY] = [canvas.width / 1.1 / (right - left || 1), canvas.height / 1.1 / (top - bottom || 1)];
    if (content.keepsScale) perX = perY = Math.min(perX, perY);
    canvas.view = { x: (left + right) / 2, y: (bottom + top) / 2, perX, perY };
    redraw();
  }

  function zoom(factor, left = canvas.width / 2, top = canvas.height / 2) {
    const [dataX, dataY] = canvas.toData(left, top);
    const { view } = canvas;
    const wide = view.perX * factor * (extents[0][1] - extents[0][0] || 1);
    if (wide < canvas.width / 20 || wide > canvas.width * 1e5) return;
    view.perX *= factor;
    view.perY *= factor;
    view.x = dataX - (left - canvas.width / 2) / view.perX;
    view.y = dataY + (top - canvas.height / 2) / view.perY;
    redraw({ isMove: true });
  }

  function shift(right, down) {
    canvas.view.x -= right / canvas.view.perX;
    canvas.view.y += down / canvas.view.perY;
    redraw({ isMove: true });
  }

  // While the map moves, what takes long is not drawn anew but moved, and drawn once it stands still.
  let settling = 0;
  function redraw({ isMove = false } = {}) {
    state.isMove = isMove && (state.isMove || !state.dirty);
    if (state.dirty) return;
    state.dirty = true;
    requestAnimationFrame(() => {
      state.dirty = false;
      clearTimeout(settling);
      if (state.isMove && canvas.tookMs > SLOW_MS) {
        canvas.move(colorsNow().background);
        settling = setTimeout(() => redraw(), 120);
      } else {
        drawPoints();
      }
      drawOverlay();
      placeTip();
    });
  }

  function evenTicks(low, high, most) {
    const raw = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw);
    const ticks = [];
    for (let n = Math.ceil(low / step); n * step <= high && ticks.length <= most; n++) ticks.push(n * step);
    return ticks;
  }

  function ticksNow() {
    if (content.keepsScale) return { x: [], y: [] };
    const [left, top] = canvas.toData(0, 0);
    const [right, bottom] = canvas.toData(canvas.width, canvas.height);
    return {
      x: evenTicks(left, right, Math.max(2, canvas.width / 90)), y: evenTicks(bottom, top, Math.max(2, canvas.height / 60)),
    };
  }

  function drawPoints() {
    const { background, grid } = colorsNow();
    const fades = state.found.length > MOST_RINGS && !state.selected.length;
    const chosen = fades ? state.found : state.selected;
    let stands = null;
    if (chosen.length) {
      stands = new Uint8Array(ids.length);
      for (const i of chosen) stands[i] = 1;
    }
    const ticks = ticksNow();
    canvas.clear(rgb(background), {
      x: ticks.x.map((value) => canvas.toScreen(value, 0)[0]), y: ticks.y.map((value) => canvas.toScreen(0, value)[1]),
    }, rgb(grid));
    canvas.draw({
      order: state.drawn, shade: shadesOf(state.column), palette: paletteOf(state.column), size: state.size,
      opacity: content.opacity, stands,
    });
  }

  const tickText = (value) => {
    const text = String(Number(value.toPrecision(12)));
    return (text.length > 7 ? value.toExponential(2) : text).replace("-", "\u2212");
  };

  function drawOverlay() {
    const { ink, quiet, line, accent, background } = colorsNow();
    const { left, top } = margins;
    const [right, bottom] = [left + canvas.width, top + canvas.height];
    pen.setTransform(canvas.ratio, 0, 0, canvas.ratio, 0, 0);
    pen.clearRect(0, 0, overlay.width, overlay.height);
    pen.lineWidth = 1;
    pen.strokeStyle = line;
    pen.beginPath();
    pen.moveTo(left - 0.5, top);
    pen.lineTo(left - 0.5, bottom + 0.5);
    pen.lineTo(right, bottom + 0.5);
    pen.stroke();
    const ticks = ticksNow();
    pen.fillStyle = quiet;
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const value of ticks.x) pen.fillText(tickText(value), left + canvas.toScreen(value, 0)[0], bottom + 6);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const value of ticks.y) pen.fillText(tickText(value), left - 6, top + canvas.toScreen(0, value)[1]);
    pen.fillStyle = ink;
    pen.font = "13px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "bottom";
    pen.fillText(content.axes[0], (left + right) / 2, map.clientHeight - 5);
    pen.save();
    pen.rotate(-Math.PI / 2);
    pen.textBaseline = "top";
    pen.fillText(content.axes[1], -(top + bottom) / 2, 6);
    pen.restore();

    pen.save();
    pen.beginPath();
    pen.rect(left, top, canvas.width, canvas.height);
    pen.clip();
    pen.translate(left, top);
    const ring = (i, color, width, room) => {
      const [u, v] = canvas.toScreen(x[i], y[i]);
      pen.beginPath();
      pen.arc(u, v, state.size / 2 + room, 0, 2 * Math.PI);
      pen.strokeStyle = color;
      pen.lineWidth = width;
      pen.stroke();
    };
    if (state.found.length <= MOST_RINGS) {
      for (const i of state.found) if (state.isShown[i]) ring(i, ink, 1.6, 3);
    }
    if (state.at >= 0) {
      ring(state.at, background, 5, 4);
      ring(state.at, accent, 2.5, 4);
    }
    if (state.outline) {
      pen.beginPath();
      state.outline.forEach(([u, v]) => pen.lineTo(u, v));
      pen.closePath();
      pen.setLineDash([5, 4]);
      pen.lineWidth = 1.5;
      pen.strokeStyle = accent;
      pen.stroke();
    }
    pen.restore();
  }

  // --- the card of a point

  function showTip(i, { pinned = false, isSpoken = false } = {}) {
    Object.assign(state, { at: i, pinned });
    const column = state.column;
    const value = `${column.name}: ${textOf(column, i) || "no value"}`;
    const size = lengths[i] < 0 ? "length unknown" : `${count(lengths[i])} bases`;
    const facts = column.name === "length" ? [size] : [size, value];
    if (pinned) {
      for (const one of columns) {
        if (one !== column && one.name !== "length") facts.push(`${one.name}: ${textOf(one, i) || "no value"}`);
      }
    }
    const tip = at("tip");
    tip.replaceChildren(element("b", ids[i]));
    if (descriptions[i]) tip.append(element("span", descriptions[i], { class: "long" }));
    tip.append(...facts.map((fact) => element("span", fact)));
    tip.classList.toggle("pinned", pinned);
    tip.hidden = false;
    if (isSpoken) at("spoken").textContent = [ids[i], descriptions[i], ...facts].filter(Boolean).join(", ");
    drawOverlay();
    placeTip();
  }

  function placeTip() {
    if (state.at < 0) return;
    const tip = at("tip");
    const box = map.getBoundingClientRect();
    const [u, v] = canvas.toScreen(x[state.at], y[state.at]);
    const [left, top] = [box.left + margins.left + u, box.top + margins.top + v];
    tip.hidden = u < 0 || v < 0 || u > canvas.width || v > canvas.height;
    if (tip.hidden) return;
    const gap = state.size / 2 + 10;
    tip.style.left = 0; // its width depends on the room to its right
    const [wide, high] = [tip.offsetWidth, tip.offsetHeight];
    const besides = left + gap + wide > window.innerWidth - 4 ? left - gap - wide : left + gap;
    const below = top + gap + high > window.innerHeight - 4 ? top - gap - high : top + gap;
    tip.style.left = `${Math.max(4, Math.min(besides, window.innerWidth - wide - 4))}px`;
    tip.style.top = `${Math.max(4, below)}px`;
  }

  function hideTip() {
    Object.assign(state, { at: -1, pinned: false });
    at("tip").hidden = true;
    drawOverlay();
  }

  // Move the map as far as is needed to see a point, or to the middle.
  function bringIntoView(i, isMiddle = false) {
    const [u, v] = canvas.toScreen(x[i], y[i]);
    const room = 30;
    if (!isMiddle && u > room && v > room && u < canvas.width - room && v < canvas.height - room) return;
    Object.assign(canvas.view, { x: x[i], y: y[i] });
    redraw();
  }

  // --- pointer: move, zoom, select, pin

  const pointers = new Map();
  let drag = null;
  const placeOf = (event) => {
    const box = map.getBoundingClientRect();
    return [event.clientX - box.left - margins.left, event.clientY - box.top - margins.top];
  };
  const spread = () => {
    const [[a, b], [c, d]] = [...pointers.values()];
    return { apart: Math.hypot(a - c, b - d), middle: [(a + c) / 2, (b + d) / 2] };
  };

  map.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    pointers.set(event.pointerId, placeOf(event));
    map.setPointerCapture(event.pointerId);
    if (pointers.size === 2) {
      Object.assign(state, { outline: null });
      drag = { pinch: spread() };
    } else if (pointers.size === 1) {
      drag = { from: placeOf(event), last: placeOf(event), hasMoved: false };
    }
  });
  map.addEventListener("pointermove", (event) => {
    const place = placeOf(event);
    if (!drag) return hover(place);
    if (!pointers.has(event.pointerId)) return;
    pointers.set(event.pointerId, place);
    if (drag.pinch) {
      if (pointers.size < 2) return;
      const now = spread();
      zoom(now.apart / (drag.pinch.apart || 1), ...now.middle);
      shift(now.middle[0] - drag.pinch.middle[0], now.middle[1] - drag.pinch.middle[1]);
      drag.pinch = now;
      return;
    }
    drag.hasMoved ||= Math.hypot(place[0] - drag.from[0], place[1] - drag.from[1]) > 4;
    if (!drag.hasMoved) return;
    if (state.at >= 0 && !state.pinned) hideTip();
    if (state.mode === "pan") {
      shift(place[0] - drag.last[0], place[1] - drag.last[1]);
    } else {
      const [[a, b], [c, d]] = [drag.from, place];
      state.outline = state.mode === "box" ? [[a, b], [c, b], [c, d], [a, d]] : [...(state.outline || [drag.from]), place];
      drawOverlay();
    }
    drag.last = place;
  });
  const release = (event) => {
    if (!pointers.delete(event.pointerId) || !drag) return;
    const done = drag;
    if (pointers.size === 0) drag = null;
    if (done.pinch) return;
    if (event.type === "pointerup" && !done.hasMoved) pin(done.from);
    if (state.outline) {
      const outline = state.outline;
      state.outline = null;
      select(event.type === "pointerup" ? inside(outline) : state.selected);
    }
  };
  map.addEventListener("pointerup", release);
  map.addEventListener("pointercancel", release);
  map.addEventListener("pointerleave", () => { if (!state.pinned && !drag) hideTip(); });
  map.addEventListener("dblclick", showAll);
  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    const pixels = event.deltaY * [1, 16, 400][event.deltaMode];
    zoom(Math.exp(-Math.max(-200, Math.min(200, pixels)) / 300), ...placeOf(event));
  }, { passive: false });

  const under = ([left, top]) => canvas.nearest(state.drawn, left, top, Math.max(REACH, state.size / 2));
  function hover(place) {
    const i = under(place);
    map.classList.toggle("on-point", i >= 0);
    if (state.pinned || i === state.at) return;
    if (i < 0) hideTip();
    else showTip(i);
  }
  function pin(place) {
    const i = under(place);
    if (i < 0 || (state.pinned && i === state.at)) hideTip();
    else showTip(i, { pinned: true });
  }

  function inside(outline) {
    const found = [];
    for (const i of state.drawn) {
      const [u, v] = canvas.toScreen(x[i], y[i]);
      let isIn = false;
      for (let k = 0, before = outline.length - 1; k < outline.length; before = k++) {
        const [[a, b], [c, d]] = [outline[k], outline[before]];
        if ((b > v) !== (d > v) && u < ((c - a) * (v - b)) / (d - b) + a) isIn = !isIn;
      }
      if (isIn) found.push(i);
    }
    return found.sort((first, second) => first - second);
  }

  // --- keys

  const ARROWS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

  function step(i) {
    if (i < 0) return;
    bringIntoView(i);
    showTip(i, { isSpoken: true });
  }

  function neighbor(by) {
    let i = state.at;
    for (let tries = 0; tries < ids.length; tries++) {
      i = (i + by + ids.length) % ids.length;
      if (state.isShown[i]) return i;
    }
    return -1;
  }

  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { key } = event;
    const [right, down] = ARROWS[key] || [];
    if (ARROWS[key] && event.shiftKey) shift(-60 * right, -60 * down);
    else if (ARROWS[key] && state.at < 0) step(canvas.nearest(state.drawn, canvas.width / 2, canvas.height / 2, Infinity));
    else if (ARROWS[key]) step(canvas.toward(state.drawn, state.at, right, down));
    else if (key === "PageDown" || key === "PageUp") step(neighbor(key === "PageDown" ? 1 : -1));
    else if (key === "Enter" && state.at >= 0) showTip(state.at, { pinned: !state.pinned, isSpoken: true });
    else if (key === " " && state.at >= 0) toggleSelected(state.at);
    else if (key === "Escape" && state.at >= 0) hideTip();
    else if (key === "Escape") select([]);
    else if (key === "+" || key === "=") zoom(1.4);
    else if (key === "-") zoom(1 / 1.4);
    else if (key === "0") showAll();
    else return;
    event.preventDefault();
  });

  // Up and down, Home and End go through the buttons of a list; Tab goes past it.
  function walk(list) {
    list.addEventListener("keydown", (event) => {
      const buttons = [...list.querySelectorAll("button")];
      const now = buttons.indexOf(document.activeElement);
      const next = {
        ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: buttons.length - 1,
      }[event.key];
      if (now < 0 || next === undefined) return;
      event.preventDefault();
      const button = buttons[Math.max(0, Math.min(next, buttons.length - 1))];
      for (const one of buttons) one.tabIndex = one === button ? 0 : -1;
      button.focus();
    });
  }
  const onlyFirst = (list) => list.querySelectorAll("button").forEach((one, n) => { one.tabIndex = n ? -1 : 0; });
  walk(at("legend"));
  walk(at("hits"));

  // --- legend

  function legendEntry(code, name, number, color) {
    const entry = element("button", undefined, { type: "button", title: "Hide or show" });
    const dot = element("i");
    dot.style.background = color;
    entry.append(dot, element("span", name), element("em", count(number)));
    entry.setAttribute("aria-pressed", String(!state.hidden.has(code)));
    entry.addEventListener("click", () => {
      if (!state.hidden.delete(code)) state.hidden.add(code);
      entry.setAttribute("aria-pressed", String(!state.hidden.has(code)));
      arrange();
    });
    return entry;
  }

  function scaleBar(column) {
    const bar = element("div", undefined, { class: "bar" });
    bar.style.background = `linear-gradient(to right, ${colorsNow().scale.join(", ")})`;
    const ticks = element("div", undefined, { class: "ticks" });
    const scaled = column.isLog ? Math.log : (value) => value;
    const [low, high] = [scaled(column.low), scaled(column.high)];
    let end = -Infinity;
    for (const [value, label] of column.ticks) {
      const part = (scaled(value) - low) / (high - low);
      const half = (label.length * 7 + 8) / 2 / 196; // of the bar's width
      if (part - half < end) continue; // it would lie on the label before
      end = part + half;
      const tick = element("span", label);
      tick.style.left = `${100 * part}%`;
      ticks.append(tick);
    }
    return [bar, ticks];
  }

  function showLegend() {
    const column = state.column;
    const legend = at("legend");
    const { missing } = colorsNow();
    legend.replaceChildren();
    let without = column.missing;
    if (isClass(column)) {
      column.classes.forEach((name, code) =>
        legend.append(legendEntry(code, name, column.counts[code], legendColors(column)[code])));
      without = ids.length - column.counts.reduce((sum, number) => sum + number, 0);
    } else {
      legend.append(...scaleBar(column));
      if (column.isLog) legend.append(element("p", "Logarithmic scale"));
    }
    if (without) legend.append(legendEntry(-1, "no value", without, missing));
    onlyFirst(legend);
  }

  // --- search

  const SHOWN_HITS = 30;
  let haystack = null;
  let waiting = 0;

  function search() {
    const wanted = at("search").value.trim().toLowerCase();
    haystack ??= ids.map((id, i) => `${id}\n${descriptions[i]}`.toLowerCase());
    state.found = [];
    if (wanted) haystack.forEach((text, i) => { if (text.includes(wanted)) state.found.push(i); });
    at("found").textContent = wanted ? `${count(state.found.length)} of ${count(ids.length)} match` : "";
    at("hits").replaceChildren(...state.found.slice(0, SHOWN_HITS).map((i) => {
      const button = element("button", ids[i], { type: "button", title: descriptions[i] });
      button.addEventListener("click", () => goTo(i));
      const item = element("li");
      item.append(button);
      return item;
    }));
    onlyFirst(at("hits"));
    redraw();
  }

  function goTo(i) {
    bringIntoView(i, true);
    if (state.isShown[i]) showTip(i, { pinned: true, isSpoken: true });
  }

  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  });
  at("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") at("hits").querySelector("button")?.focus();
    else if (event.key === "Enter" && state.found.length) goTo(state.found[0]);
    else return;
    event.preventDefault();
  });

  // --- selection

  function select(points) {
    state.selected = points;
    const number = points.length;
    at("selected").textContent = number
      ? `${count(number)} selected`
      : "Choose lasso or box, then draw around points to select them.";
    at("download").disabled = at("clear").disabled = !number;
    redraw();
  }

  function toggleSelected(i) {
    const chosen = new Set(state.selected);
    if (!chosen.delete(i)) chosen.add(i);
    select([...chosen].sort((first, second) => first - second));
  }

  function tableOf(points) {
    const others = columns.filter((column) => column.name !== "length");
    const line = (cells) => cells.map((cell) => String(cell).replace(/[\t\r\n]/g, " ")).join("\t");
    const lines = [line(["id", "x", "y", "description", "length", ...others.map((column) => column.name)])];
    for (const i of points) {
      lines.push(line([
        ids[i], Number(x[i].toPrecision(6)), Number(y[i].toPrecision(6)), descriptions[i], lengths[i] < 0 ? "" : lengths[i],
        ...others.map((column) => textOf(column, i)),
      ]));
    }
    return lines.join("\n") + "\n";
  }

  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  at("download").addEventListener("click", () =>
    save(new Blob([tableOf(state.selected)], { type: "text/tab-separated-values" }), "selected.tsv"));
  at("clear").addEventListener("click", () => select([]));

  // --- a picture of what is on the map, with its title, legend and notes

  function paintPicture() {
    const column = state.column;
    const { background, ink, quiet, missing, scale } = colorsNow();
    const paper = document.createElement("canvas");
    const ratio = canvas.ratio;
    const [wide, high, beside] = [map.clientWidth, map.clientHeight, 210];
    const entries = [...at("legend").querySelectorAll('button[aria-pressed="true"]')].map((entry) =>
      [entry.querySelector("i").style.background, entry.querySelector("span").textContent, entry.querySelector("em").textContent]);
    const bottom = Math.max(high, 60 + 18 * entries.length + (isClass(column) ? 0 : 50));
    [paper.width, paper.height] = [(wide + beside) * ratio, (bottom + 80) * ratio];
    const brush = paper.getContext("2d");
    brush.scale(ratio, ratio);
    brush.fillStyle = background;
    brush.fillRect(0, 0, wide + beside, bottom + 80);
    brush.drawImage(canvas.canvas, margins.left, 40 + margins.top, canvas.width, canvas.height);
    brush.drawImage(overlay, 0, 40, wide, high);
    const write = (text, left, top, room, font, color) => {
      brush.font = `${font} system-ui, sans-serif`;
      brush.fillStyle = color;
      let shown = text;
      while (shown.length > 1 && brush.measureText(shown === text ? text : `${shown}…`).width > room) shown = shown.slice(0, -1);
      brush.fillText(shown === text ? text : `${shown}…`, left, top);
    };
    write(content.title, margins.left, 26, wide, "bold 17px", ink);
    write(content.notes.join(" · "), margins.left, bottom + 62, wide + beside - margins.left - 10, "12px", quiet);
    write(column.name, wide + 8, 60, beside - 20, "bold 13px", ink);
    let top = 82;
    if (!isClass(column)) {
      const shades = brush.createLinearGradient(wide + 8, 0, wide + beside - 24, 0);
      scale.forEach((color, n) => shades.addColorStop(n / (scale.length - 1), color));
      brush.fillStyle = shades;
      brush.fillRect(wide + 8, 70, beside - 32, 12);
      const [first, last] = [column.ticks[0], column.ticks[column.ticks.length - 1]];
      const scaled = column.isLog ? Math.log : (value) => value;
      brush.textAlign = "center";
      for (const [value, label] of [first, last]) {
        const part = (scaled(value) - scaled(column.low)) / (scaled(column.high) - scaled(column.low));
        write(label, wide + 8 + part * (beside - 32), 98, beside / 2, "12px", ink);
      }
      brush.textAlign = "left";
      top = 122;
    }
    for (const [color, name, number] of entries) {
      brush.fillStyle = color || missing;
      brush.beginPath();
      brush.arc(wide + 14, top - 4, 5, 0, 2 * Math.PI);
      brush.fill();
      write(`${name} (${number})`, wide + 26, top, beside - 34, "12.5px", ink);
      top += 18;
    }
    return paper;
  }

  at("picture").addEventListener("click", () => paintPicture().toBlob((blob) => save(blob, "map.png")));

  // --- start

  function setTheme(theme) {
    state.theme = theme;
    at("theme").textContent = theme === "dark" ? "Light" : "Dark";
    at("theme").setAttribute("aria-label", theme === "dark" ? "Light background" : "Dark background");
    showLegend();
    redraw();
  }
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const themeOf = () => document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light");
  prefersDark.addEventListener("change", () => setTheme(themeOf()));
  at("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = state.theme === "dark" ? "light" : "dark";
    setTheme(themeOf());
  });

  columns.forEach((column, index) => at("color").append(element("option", column.name, { value: index })));
  at("color").addEventListener("change", () => {
    state.column = columns[Number(at("color").value)];
    state.hidden = new Set();
    if (state.at >= 0) showTip(state.at, { pinned: state.pinned });
    showLegend();
    arrange();
  });
  at("size").value = state.size;
  at("size").addEventListener("input", () => {
    state.size = Number(at("size").value);
    redraw();
  });
  for (const radio of document.querySelectorAll('input[name="mode"]')) {
    radio.addEventListener("change", () => { map.dataset.mode = state.mode = radio.value; });
  }
  at("title").textContent = content.title;
  at("notes").textContent = content.notes.join(" · ");
  map.setAttribute("aria-label", `Map of ${count(ids.length)} records`);
  setTheme(themeOf());
  arrange();
  fit();
  new ResizeObserver(fit).observe(map);
  window.addEventListener("scroll", placeTip, { passive: true });
  select([]);
})();
