// Elements, numbers and text. Data reaches the page only through textContent and attributes set here.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
    else if (name === "css") for (const [key, is] of Object.entries(value)) element.style.setProperty(key, is);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** An HTML element: `on` holds listeners, `css` style properties, all else attributes. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, alike. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export const byId = (id) => document.getElementById(id);

/** Three significant digits, as `:.3g` of Python writes them. */
export function short(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-4 && size < 10 ** Math.max(digits, 4)) {
    const text = value.toPrecision(digits);
    return (text.includes("e") ? String(Math.round(value)) : text).replace("-", "−");
  }
  return value
    .toExponential(digits - 1)
    .replace("-", "−")
    .replace("e+", "e");
}

/** The same with its sign. */
export function signed(value, digits = 3) {
  return (value > 0 ? "+" : "") + short(value, digits);
}

export function percent(share) {
  const value = 100 * share;
  return `${value >= 9.95 ? value.toFixed(0) : value.toFixed(1)}%`;
}

const VISIBLE = { 9: "⇥", 10: "⏎", 13: "␍", 127: "␡" };

/** Text with everything made visible that a line cannot show, direction overrides included. */
export function visible(text) {
  let out = "";
  for (const letter of String(text)) {
    const code = letter.codePointAt(0);
    if (VISIBLE[code]) out += VISIBLE[code];
    else if (code < 32) out += String.fromCodePoint(0x2400 + code);
    else if ((code >= 0x80 && code <= 0x9f) || (code >= 0xd800 && code <= 0xdfff)) out += "\ufffd";
    else if ((code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069)) out += "\ufffd";
    else out += letter;
  }
  return out;
}

/** A token without the space that most begin with, and nothing invisible. */
export function tokenText(token) {
  const text = visible(token);
  return text.trim() || "␣".repeat([...text].length) || "∅";
}

export function quoted(token) {
  return `“${visible(token)}”`;
}

/** At most so many letters, with an ellipsis. */
export function clipped(text, letters) {
  const all = [...text];
  return all.length > letters ? all.slice(0, letters - 1).join("") + "…" : text;
}

/** Run once in the next frame, however often it is asked for until then. */
export function nextFrame(act) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      act();
    });
  };
}
