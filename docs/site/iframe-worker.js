// Search in pages opened as files. Browsers start no worker from file: addresses, so the script of the worker runs
// in a hidden frame instead, which answers messages as a worker would. Served pages keep the real thing.
"use strict";
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    #frame = document.createElement("iframe");
    #waiting = []; // what was sent before the script was there

    constructor(url) {
      super();
      this.#frame.hidden = true;
      document.body.append(this.#frame);
      const { contentWindow: inside, contentDocument: page } = this.#frame;
      const answer = (type, more) => this.dispatchEvent(new MessageEvent(type, more));
      inside.postMessage = (data) => setTimeout(() => answer("message", { data }));
      inside.importScripts = (...urls) =>
        urls.reduce((before, next) => before.then(() => load(next)), Promise.resolve());
      inside.addEventListener("error", (event) => answer("error", { data: event.message }));
      const load = (source) => new Promise((done, failed) => {
        const script = page.createElement("script");
        script.src = new URL(source, document.baseURI);
        [script.onload, script.onerror] = [done, failed];
        page.head.append(script);
      });
      load(url).then(() => {
        const waiting = this.#waiting;
        this.#waiting = null;
        waiting.forEach((data) => this.postMessage(data));
      }, () => answer("error", { data: `${url} is not there` }));
    }

    set onmessage(listener) { this.addEventListener("message", listener); }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data);
      else this.#frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() { this.#frame.remove(); }
  }
  // The theme's search looks for this name to find its own files.
  window.IFrameWorker = window.Worker = IFrameWorker;
}
