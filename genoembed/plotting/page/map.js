"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const content = JSON.parse(at("content").textContent);
  const decoded = (text, Kind) => {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Kind(bytes.buffer);
  };
  const ids = content.ids;
  const x = decoded(content.x, Float32Array);
  const y = decoded(content.y, Float32Array);
  const lengths = decoded(content.lengths, Float64Array);
  const order = decoded(content.order, Int32Array);
  const columns = content.columns.map((column) =>
    column.kind === "class"
      ? { ...column, codes: decoded(column.codes, Int16Array), textOf: decoded(column.textOf, Int32Array) }
      : { ...column, values: decoded(column.values, Float64Array) });
  const count = (number) => number.toLocaleString("en");
  const hasWebGL = (() => {
    const canvas = document.createElement("canvas");
    return Boolean(canvas.getContext("webgl2") || canvas.getContext("webgl"));
  })();

  const state = { column: columns[0], hidden: new Set(), found: [], selected: [], size: content.size, mode: "pan" };
  // For each trace, which point is behind its n-th marker.
  let pointsOf = [[], [], []];
  const map = at("map");
  const MOST_RINGS = 200;
  // Drawing takes the outline of a selection away, and plotly then reports an empty one: not the user's doing.
  let drawing = 0;

  const textOf = (column, i) => {
    if (column.kind === "class") return column.texts[column.textOf[i]];
    return Number.isNaN(column.values[i]) ? "" : String(Number(column.values[i].toPrecision(10)));
  };
  const isMissing = (column, i) =>
    column.kind === "class" ? column.codes[i] < 0 : Number.isNaN(column.values[i]);
  const codeOf = (column, i) => (column.kind === "class" ? column.codes[i] : isMissing(column, i) ? -1 : 0);

  // The view that a double click goes back to: all points and a margin, whatever is drawn around them later.
  const extent = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
    const margin = (high - low || 1) * 0.05;
    return [low - margin, high + margin];
  };
  const view = { x: extent(x), y: extent(y) };

  // --- traces: points without a value, points with one, and rings around what the search found

  const picked = (source, points) => Array.from(points, (i) => source[i]);

  function trace(points, marker, more = {}) {
    return {
      type: hasWebGL ? "scattergl" : "scatter", mode: "markers", x: picked(x, points), y: picked(y, points),
      hoverinfo: "none", showlegend: false, marker, ...more,
    };
  }

  function colored(column, points) {
    const marker = { size: state.size, opacity: content.opacity, line: { width: 0 } };
    if (column.kind === "class") {
      const last = column.colors.length;
      const steps = column.colors.flatMap((color, code) => [[code / last, color], [(code + 1) / last, color]]);
      return { ...marker, color: picked(column.codes, points), cmin: -0.5, cmax: last - 0.5, colorscale: steps };
    }
    const scaled = column.ticks ? Math.log10 : (value) => value;
    const bar = { thickness: 14, len: 0.6, outlinewidth: 0, title: { text: column.name, side: "right" } };
    if (column.ticks) {
      bar.tickvals = column.ticks.map(Math.log10);
      bar.ticktext = column.ticks.map((tick) => (tick >= 1e6 ? tick.toExponential(0) : count(tick)));
    }
    return {
      ...marker, color: Array.from(points, (i) => scaled(column.values[i])), colorscale: "Viridis",
      cmin: scaled(column.low), cmax: scaled(column.high), showscale: true, colorbar: bar,
    };
  }

  function draw() {
    const column = state.column;
    // Rings around a few points show them; around thousands they hide everything, and the others fade instead.
    const fades = state.found.length > MOST_RINGS;
    const chosen = new Set(fades && !state.selected.length ? state.found : state.selected);
    const [missing, valued] = [[], []];
    for (const i of order) {
      if (!state.hidden.has(codeOf(column, i))) (isMissing(column, i) ? missing : valued).push(i);
    }
    const shown = fades ? [] : state.found.filter((i) => !state.hidden.has(codeOf(column, i)));
    pointsOf = [missing, valued, shown];
    const selection = (points) => {
      if (!chosen.size) return {};
      const places = [];
      points.forEach((i, place) => { if (chosen.has(i)) places.push(place); });
      return { selectedpoints: places, unselected: { marker: { opacity: content.opacity / 6 } } };
    };
    const ring = {
      size: state.size + 7, color: "rgba(0,0,0,0)", symbol: "circle", line: { color: "#000", width: 1.6 },
    };
    const traces = [
      trace(missing, { size: state.size, opacity: content.opacity, color: content.missing }, selection(missing)),
      trace(valued, colored(column, valued), selection(valued)),
      trace(shown, ring, { type: "scatter", hoverinfo: "skip" }),
    ];
    const axis = { zeroline: false, gridcolor: "#eee", linecolor: "#999", showline: true, tickfont: { size: 10 } };
    const plain = content.keepsScale ? { showticklabels: false, showgrid: false, ticks: "" } : {};
    const layout = {
      margin: { l: 54, r: 16, t: 12, b: 44 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff", uirevision: "view",
      dragmode: state.mode, hovermode: "closest", selectionrevision: String(state.selected.length),
      xaxis: { ...axis, ...plain, range: [...view.x], title: { text: content.axes[0] } },
      yaxis: { ...axis, ...plain, range: [...view.y], title: { text: content.axes[1] } },
    };
    if (content.keepsScale) layout.yaxis.scaleanchor = "x";
    drawing += 1;
    Plotly.react(map, traces, layout, {
      responsive: true, scrollZoom: true, displaylogo: false, doubleClick: "reset",
      modeBarButtons: [["toImage"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
      toImageButtonOptions: { filename: "map", scale: 2 },
    }).finally(() => { drawing -= 1; });
  }

  // --- legend

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function legendEntry(code, name, number, color) {
    const entry = element("button", undefined, { type: "button", title: "Hide or show" });
    const dot = element("i");
    dot.style.background = color;
    entry.append(dot, element("span", name), element("em", count(number)));
    entry.setAttribute("aria-pressed", String(!state.hidden.has(code)));
    entry.addEventListener("click", () => {
      if (!state.hidden.delete(code)) state.hidden.add(code);
      entry.setAttribute("aria-pressed", String(!state.hidden.has(code)));
      draw();
    });
    return entry;
  }

  function showLegend() {
    const column = state.column;
    const legend = at("legend");
    legend.replaceChildren();
    let missing = column.missing;
    if (column.kind === "class") {
      column.classes.forEach((name, code) =>
        legend.append(legendEntry(code, name, column.counts[code], column.colors[code])));
      missing = ids.length - column.counts.reduce((sum, number) => sum + number, 0);
    } else if (column.ticks) {
      legend.append(element("p", "Logarithmic scale"));
    }
    if (missing) legend.append(legendEntry(-1, "no value", missing, content.missing));
  }

  // --- hover

  function showTip(event) {
    const hit = event.points.find((point) => point.curveNumber < 2);
    if (!hit) return;
    const i = pointsOf[hit.curveNumber][hit.pointNumber];
    const tip = at("tip");
    tip.replaceChildren(element("b", ids[i]));
    if (content.descriptions[i]) tip.append(element("span", content.descriptions[i]));
    tip.append(element("span", `${count(lengths[i])} bases`));
    if (state.column.name !== "length") {
      tip.append(element("span", `${state.column.name}: ${textOf(state.column, i) || "no value"}`));
    }
    tip.hidden = false;
    const [left, top] = [event.event.clientX + 14, event.event.clientY + 14];
    tip.style.left = `${Math.max(4, Math.min(left, window.innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(top, window.innerHeight - tip.offsetHeight - 8))}px`;
  }

  // --- search

  const SHOWN_HITS = 30;
  let haystack = null;

  function search() {
    const wanted = at("search").value.trim().toLowerCase();
    haystack ??= ids.map((id, i) => `${id}\n${content.descriptions[i]}`.toLowerCase());
    state.found = [];
    if (wanted) haystack.forEach((text, i) => { if (text.includes(wanted)) state.found.push(i); });
    at("found").textContent = wanted ? `${count(state.found.length)} of ${count(ids.length)} match` : "";
    at("hits").replaceChildren(...state.found.slice(0, SHOWN_HITS).map((i) => {
      const button = element("button", ids[i], { type: "button", title: content.descriptions[i] });
      button.addEventListener("click", () => goTo(i));
      const item = element("li");
      item.append(button);
      return item;
    }));
    draw();
  }

  function goTo(i) {
    const around = (axis, middle) => {
      const [from, to] = map._fullLayout[axis].range;
      const half = Math.abs(to - from) / 2;
      return [middle - half, middle + half];
    };
    Plotly.relayout(map, { "xaxis.range": around("xaxis", x[i]), "yaxis.range": around("yaxis", y[i]) });
  }

  let waiting = 0;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  });

  // --- selection

  function select(points) {
    state.selected = points;
    const number = points.length;
    at("selected").textContent = number
      ? `${count(number)} selected`
      : "Choose lasso or box, then draw around points to select them.";
    at("download").disabled = at("clear").disabled = !number;
    draw();
  }

  function takeSelection(event) {
    if (!event || drawing) return;
    const taken = new Set();
    for (const point of event.points) {
      if (point.curveNumber < 2) taken.add(pointsOf[point.curveNumber][point.pointNumber]);
    }
    setTimeout(() => select([...taken].sort((first, second) => first - second)));
  }

  function tableOf(points) {
    const others = columns.filter((column) => column.name !== "length");
    const line = (cells) => cells.map((cell) => String(cell).replace(/[\t\r\n]/g, " ")).join("\t");
    const lines = [line(["id", "x", "y", "description", "length", ...others.map((column) => column.name)])];
    for (const i of points) {
      lines.push(line([
        ids[i], Number(x[i].toPrecision(6)), Number(y[i].toPrecision(6)), content.descriptions[i], lengths[i],
        ...others.map((column) => textOf(column, i)),
      ]));
    }
    return lines.join("\n") + "\n";
  }

  at("download").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([tableOf(state.selected)], { type: "text/tab-separated-values" }));
    link.download = "selected.tsv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  at("clear").addEventListener("click", () => select([]));
  for (const radio of document.querySelectorAll('input[name="mode"]')) {
    radio.addEventListener("change", () => {
      state.mode = radio.value;
      Plotly.relayout(map, { dragmode: state.mode });
    });
  }

  // --- start

  columns.forEach((column, index) => at("color").append(element("option", column.name, { value: index })));
  at("color").addEventListener("change", () => {
    state.column = columns[Number(at("color").value)];
    state.hidden = new Set();
    showLegend();
    draw();
  });
  at("size").value = state.size;
  at("size").addEventListener("input", () => {
    state.size = Number(at("size").value);
    draw();
  });
  at("title").textContent = content.title;
  at("notes").textContent = [...content.notes, ...(hasWebGL ? [] : ["drawn without WebGL, which is slow"])].join(" · ");
  showLegend();
  select([]);
  map.on("plotly_hover", showTip);
  map.on("plotly_unhover", () => { at("tip").hidden = true; });
  map.on("plotly_selected", takeSelection);
  map.on("plotly_deselect", () => { if (!drawing) setTimeout(() => select([])); });
})();
