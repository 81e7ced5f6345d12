"use strict";

// Round points, drawn into the pixels of a canvas by adding up colors: no graphics card, and the same on every machine.
class PointCanvas {
  static STEPS = 4; // places within a pixel at which the middle of a point may lie, along each axis

  constructor(canvas, x, y) {
    Object.assign(this, { canvas, x, y, context: canvas.getContext("2d", { alpha: false }) });
    this.places = new Float32Array(2 * x.length); // where each point was drawn last, in CSS pixels
    this.view = { x: 0, y: 0, perX: 1, perY: 1 }; // what is in the middle, and CSS pixels per unit
    this.sheet = canvas.cloneNode(); // what was drawn last, and the view of then
    this.tookMs = 0;
  }

  resize(width, height, ratio) {
    Object.assign(this, { width, height, ratio });
    this.canvas.width = Math.max(1, Math.round(width * ratio));
    this.canvas.height = Math.max(1, Math.round(height * ratio));
    [this.sheet.width, this.sheet.height] = [this.canvas.width, this.canvas.height];
    this.image = this.context.createImageData(this.canvas.width, this.canvas.height);
    this.words = new Int32Array(this.image.data.buffer);
  }

  toScreen(x, y) {
    return [(x - this.view.x) * this.view.perX + this.width / 2, this.height / 2 - (y - this.view.y) * this.view.perY];
  }

  toData(left, top) {
    return [(left - this.width / 2) / this.view.perX + this.view.x, (this.height / 2 - top) / this.view.perY + this.view.y];
  }

  // The pixels of a disc, as steps from its first one, and how much of each it covers, as alpha of 1 to 256; for each
  // place within a pixel where its middle may lie.
  discs(radius, opacity) {
    const side = Math.ceil(2 * radius) + 2;
    const steps = PointCanvas.STEPS;
    const made = [];
    for (let down = 0; down < steps; down++) {
      for (let right = 0; right < steps; right++) {
        const [left, top] = [side / 2 + (right + 0.5) / steps, side / 2 + (down + 0.5) / steps];
        const [across, jumps, alphas] = [[], [], []];
        for (let v = 0; v < side; v++) {
          for (let u = 0; u < side; u++) {
            const covered = radius + 0.5 - Math.hypot(u + 0.5 - left, v + 0.5 - top);
            const alpha = Math.round(256 * opacity * Math.min(1, Math.max(0, covered)));
            if (alpha > 0) {
              across.push(u);
              jumps.push(v * this.canvas.width + u);
              alphas.push(alpha);
            }
          }
        }
        made.push({ across: Int32Array.from(across), jumps: Int32Array.from(jumps), alphas: Int32Array.from(alphas) });
      }
    }
    return made;
  }

  static word([r, g, b]) { return 255 << 24 | b << 16 | g << 8 | r; }

  clear(color, lines, grid) {
    this.words.fill(PointCanvas.word(color));
    const [across, down, line] = [this.canvas.width, this.canvas.height, PointCanvas.word(grid)];
    for (const left of lines.x) {
      const at = Math.round(left * this.ratio);
      if (at >= 0 && at < across) for (let v = 0; v < down; v++) this.words[v * across + at] = line;
    }
    for (const top of lines.y) {
      const at = Math.round(top * this.ratio);
      if (at >= 0 && at < down) this.words.fill(line, at * across, (at + 1) * across);
    }
  }

  // Draw points in this order; `shade` picks each one's color of `palette`, and `stands` who is not faded (null: all).
  draw({ order, shade, palette, size, opacity, stands }) {
    const started = performance.now();
    const { x, y, places, words, ratio, view } = this;
    const [across, down, steps] = [this.canvas.width, this.canvas.height, PointCanvas.STEPS];
    const radius = (size * ratio) / 2;
    const side = Math.ceil(2 * radius) + 2;
    const bright = this.discs(radius, opacity);
    const faded = stands && this.discs(radius, opacity / 6);
    const colors = Int32Array.from(palette, PointCanvas.word);
    for (let k = 0; k < order.length; k++) {
      const i = order[k];
      const left = (x[i] - view.x) * view.perX + this.width / 2;
      const top = this.height / 2 - (y[i] - view.y) * view.perY;
      places[2 * i] = left;
      places[2 * i + 1] = top;
      const exactU = left * ratio - side / 2;
      const exactV = top * ratio - side / 2;
      const u0 = Math.floor(exactU);
      const v0 = Math.floor(exactV);
      if (!(u0 > -side && v0 > -side && u0 < across && v0 < down)) continue;
      const place = Math.floor((exactV - v0) * steps) * steps + Math.floor((exactU - u0) * steps);
      const disc = (stands && !stands[i] ? faded : bright)[place];
      const color = colors[shade[i]];
      // red and blue are added up in one number, with room between them; green apart
      const redBlue = color & 0xff00ff;
      const green = color & 0x00ff00;
      const isWhole = u0 >= 0 && v0 >= 0 && u0 + side <= across && v0 + side <= down;
      const from = v0 * across + u0;
      const jumps = disc.jumps;
      const alphas = disc.alphas;
      for (let m = 0; m < jumps.length; m++) {
        const at = from + jumps[m];
        if (!isWhole) {
          const u = u0 + disc.across[m];
          if (u < 0 || u >= across || at < 0 || at >= words.length) continue;
        }
        const old = words[at];
        const a = alphas[m];
        const mixed = (Math.imul(old & 0xff00ff, 256 - a) + Math.imul(redBlue, a)) >>> 8;
        const mixedGreen = (Math.imul(old & 0x00ff00, 256 - a) + Math.imul(green, a)) >>> 8;
        words[at] = 0xff000000 | (mixed & 0xff00ff) | (mixedGreen & 0x00ff00);
      }
    }
    this.sheet.getContext("2d").putImageData(this.image, 0, 0);
    this.context.drawImage(this.sheet, 0, 0);
    this.drawnView = { ...view };
    this.tookMs = performance.now() - started;
  }

  // Show what was drawn last as it lies in the view of now: at once, however many points there are.
  move(background) {
    const { view, drawnView: then, context, ratio } = this;
    const [wide, high] = [view.perX / then.perX, view.perY / then.perY];
    const [left, top] = this.toScreen(then.x, then.y);
    context.fillStyle = background;
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const [across, down] = [this.canvas.width * wide, this.canvas.height * high];
    context.drawImage(this.sheet, left * ratio - across / 2, top * ratio - down / 2, across, down);
  }

  // The point of `order` that was drawn nearest to a place, at most `limit` CSS pixels away; -1 if there is none.
  nearest(order, left, top, limit) {
    let [best, found] = [limit * limit, -1];
    for (let k = 0; k < order.length; k++) {
      const i = order[k];
      const [across, down] = [this.places[2 * i] - left, this.places[2 * i + 1] - top];
      const distance = across * across + down * down;
      if (distance <= best) [best, found] = [distance, i];
    }
    return found;
  }

  // The nearest point within 45 degrees of a direction, or else on that side; -1 if there is none.
  toward(order, from, right, down) {
    const { places } = this;
    let [best, found, bestAside, aside] = [Infinity, -1, Infinity, -1];
    for (let k = 0; k < order.length; k++) {
      const i = order[k];
      const [u, v] = [places[2 * i] - places[2 * from], places[2 * i + 1] - places[2 * from + 1]];
      const along = u * right + v * down;
      if (along < 0.5) continue;
      const off = Math.abs(u * down - v * right);
      const distance = along * along + 4 * off * off;
      if (off <= along) {
        if (distance < best) [best, found] = [distance, i];
      } else if (distance < bestAside) [bestAside, aside] = [distance, i];
    }
    return found >= 0 ? found : aside;
  }
}
