// Questions to the server, the progress of jobs, and what the pages have in common.

import { byId, h } from "./dom.js";

/** The data that came with the page. */
export const data = JSON.parse(byId("data").textContent);

export function show(...parts) {
  byId("page").replaceChildren(...parts.flat(Infinity).filter(Boolean));
}

export function say(text) {
  byId("status").textContent = text;
}

/** The address of something with a name, which may hold any letter. */
export function path(...parts) {
  return "/" + parts.map(encodeURIComponent).join("/");
}

/** Ask the server to do something; its answer, or an error with its words. */
export async function post(address, content = {}) {
  let response;
  try {
    response = await fetch(address, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(content),
    });
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `The server answered ${response.status}.`);
  return answer;
}

/** Follow a job to its end: `told` hears of every change; gives the result, or throws the error in words. */
export function follow(job, told) {
  return new Promise((done, failed) => {
    const source = new EventSource(path("api", "jobs", job, "events"));
    let lost = 0;
    source.onmessage = ({ data: text }) => {
      const report = JSON.parse(text);
      lost = 0;
      told(report);
      if (report.state !== "done" && report.state !== "failed") return;
      source.close();
      if (report.state === "done") done(report.result);
      else failed(new Error(report.error));
    };
    source.onerror = () => {
      lost += 1;
      if (source.readyState !== EventSource.CLOSED && lost < 4) return;
      source.close();
      failed(new Error("The connection to the server is lost; is it still running?"));
    };
  });
}

/** A line that shows a job under way and a button that stops it. */
export class Progress {
  constructor() {
    this.bar = h("progress", { "aria-label": "Progress" });
    this.words = h("span", { class: "quiet" });
    this.stop = h("button", { type: "button", on: { click: () => this.halt() } }, "Stop");
    this.box = h("div", { class: "progress", hidden: true }, this.bar, this.words, this.stop);
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.parts = [this.box, this.error];
  }

  /** Begin a job and follow it; gives its result, undefined if it failed and has said so. */
  async run(address, content) {
    this.error.hidden = true;
    this.box.hidden = false;
    this.draw({ state: "waiting", ahead: 0 });
    try {
      const { job } = await post(address, content);
      this.job = job;
      return await follow(job, (report) => this.draw(report));
    } catch (error) {
      this.error.textContent = error.message;
      this.error.hidden = false;
      return undefined;
    } finally {
      this.box.hidden = true;
      this.job = undefined;
    }
  }

  draw({ state, stage = "", done = 0, total = 0, ahead = 0 }) {
    if (total) {
      this.bar.max = total;
      this.bar.value = Math.min(done, total);
    } else this.bar.removeAttribute("value");
    const counted = total ? ` ${done} of ${total}` : "";
    this.words.textContent = state === "waiting" && ahead ? `${ahead} ahead` : state === "waiting" ? "asking" : stage + counted;
  }

  halt() {
    if (this.job) post(path("api", "jobs", this.job, "stop")).catch(() => {});
  }
}

/** `2 minutes ago`, or the date. */
export function ago(seconds) {
  const past = Date.now() / 1000 - seconds;
  if (past < 90) return "just now";
  if (past < 5400) return `${Math.round(past / 60)} minutes ago`;
  if (past < 129600) return `${Math.round(past / 3600)} hours ago`;
  return new Date(1000 * seconds).toISOString().slice(0, 10);
}
