"use strict";
// Cards are made as they come into view, so that thousands of records open at once.
const { records, pictures } = JSON.parse(document.getElementById("content").textContent);
const form = document.querySelector(".filters"), place = document.getElementById("records");
const status = document.querySelector(".shown"), end = document.getElementById("end");
const STEP = 20;
let found = records, made = 0;

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A text in pieces: 1 differs, 2 written by the model, 4 a cut.
function marked(pieces, name) {
  const whole = element("dd");
  for (const [text, flags] of pieces) {
    let inner = document.createTextNode(text);
    if (flags & 4) inner = element("span", "cut", "┃");
    if (flags & 1) {
      const mark = element("mark", name === "chosen" ? "kept" : "");
      mark.append(inner);
      inner = mark;
    }
    if (flags & 2) {
      const under = element("u");
      under.append(inner);
      inner = under;
    }
    whole.append(inner);
  }
  return whole;
}

function figure(record) {
  const whole = element("figure");
  for (const index of record.pictures) {
    const picture = index === null ? null : pictures[index];
    if (!picture) {
      whole.append(element("p", "note", "(no readable picture)"));
      continue;
    }
    const image = element("img", picture.enlarged ? "enlarged" : "");
    const factor = picture.enlarged ? 1 : Math.min(1.5, 192 / Math.max(picture.width, picture.height));
    Object.assign(image, { src: picture.src, alt: "Picture of " + record.id });
    image.width = Math.round(picture.width * factor);
    image.height = Math.round(picture.height * factor);
    whole.append(image);
  }
  const caption = element("figcaption", "", record.id);
  caption.append(element("br"), record.source);
  whole.append(caption);
  return whole;
}

function card(record) {
  const whole = element("article", "card"), texts = element("div"), answers = element("dl");
  for (const [role, text] of record.history) texts.append(element("p", "history", role + ": " + text));
  texts.append(element("p", "question", record.prompt));
  for (const [name, pieces] of record.answers) {
    answers.append(element("dt", name === "chosen" ? "aligned" : name, name), marked(pieces, name));
  }
  texts.append(answers);
  const facts = record.facts.slice();
  if (record.likeness !== null) {
    const more = record.difference > 0 ? "the chosen " : "the rejected ";
    const longer = record.difference ? more + Math.abs(record.difference) + " longer" : "equally many";
    facts.unshift(["words", record.likeness.toFixed(2) + " in common, " + longer]);
  }
  const short = facts.filter(([, text]) => text.length <= 60 && !text.includes("\n"));
  for (const several of [short, ...facts.filter((fact) => !short.includes(fact)).map((fact) => [fact])]) {
    const line = element("p", "pair-facts");
    several.forEach(([name, text], at) => line.append(at ? " · " : "", element("b", "", name + ": "), text));
    if (several.length) texts.append(line);
  }
  whole.append(figure(record), texts);
  return whole;
}

function more() {
  const next = found.slice(made, made + STEP);
  made += next.length;
  place.append(...next.map(card));
}

function text(record) {
  const answers = record.answers.map(([, pieces]) => pieces.map(([part]) => part).join(""));
  return [record.id, record.prompt, ...answers].join("\n").toLowerCase();
}

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  const search = wanted.text.trim().toLowerCase();
  const within = (value, least, most) =>
    (least === "" && most === "") ||
    (value !== null && (least === "" || value >= +least) && (most === "" || value <= +most));
  found = records.filter((record) =>
    (!wanted.source || record.source === wanted.source) &&
    within(record.difference, wanted.shortest, wanted.longest) &&
    within(record.likeness, wanted.least, wanted.most) &&
    (!search || text(record).includes(search)));
  if (wanted.order) {
    const name = wanted.order.replace("-", ""), sign = wanted.order.startsWith("-") ? -1 : 1;
    const rank = (record) => (record[name] === null ? Infinity : sign * record[name]);
    found = found.slice().sort((one, other) => (rank(one) < rank(other) ? -1 : rank(one) > rank(other) ? 1 : 0));
  }
  const count = found.length.toLocaleString("en"), all = records.length.toLocaleString("en");
  status.textContent = found.length === records.length ? count + " records" : count + " of " + all + " records";
  place.replaceChildren();
  made = 0;
  more();
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
const watch = new IntersectionObserver((entries) => {
  if (!entries.some((entry) => entry.isIntersecting) || made === found.length) return;
  more();
  watch.unobserve(end); // what stays in view is told again only where it is observed anew
  watch.observe(end);
}, { rootMargin: "1200px" });
watch.observe(end);
filter();
