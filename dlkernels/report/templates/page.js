"use strict";

// The theme: what the system asks for, unless the address ends in #dark or #light, or the reader has pressed the button.
const root = document.documentElement;
const button = document.getElementById("theme");
const system = window.matchMedia("(prefers-color-scheme: dark)");

function remembered() {
  try { return localStorage.getItem("dlkernels-theme"); } catch { return null; }  // file:// may forbid storage
}

function paint(theme) {
  if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  button.textContent = dark ? "Light" : "Dark";
  button.setAttribute("aria-label", dark ? "Switch to light colours" : "Switch to dark colours");
}

const asked = () => location.hash.slice(1);
paint(["dark", "light"].includes(asked()) ? asked() : remembered());
button.hidden = false;
button.addEventListener("click", () => {
  const theme = button.textContent.toLowerCase();
  paint(theme);
  try { localStorage.setItem("dlkernels-theme", theme); } catch { /* the choice lasts for this visit */ }
});
window.addEventListener("hashchange", () => paint(asked()));
system.addEventListener("change", () => paint());

// The tooltip: the mark nearest to the pointer, so that a small mark is easy to hit and a tap works.
const tip = document.getElementById("tip");
for (const plot of document.querySelectorAll("svg.plot")) {
  const marks = [...plot.querySelectorAll(".mark")].map((mark) => {
    const title = mark.querySelector("title");
    title.remove();
    return { mark, text: title.textContent };
  });
  const show = (event) => {
    let nearest = null, least = 28;
    for (const item of marks) {
      const box = item.mark.getBoundingClientRect();
      const away = Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
      if (away < least) { least = away; nearest = { ...item, box }; }
    }
    tip.hidden = nearest === null;
    if (nearest === null) return;
    tip.textContent = nearest.text;
    const { box } = nearest;
    const left = Math.min(Math.max(8, box.x + 12), root.clientWidth - tip.offsetWidth - 8);
    const above = box.y - tip.offsetHeight - 8;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 8) + window.scrollY}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { tip.hidden = true; });
}

// Printing shows what is folded away.
const folded = () => document.querySelectorAll("details:not([open])");
let opened = [];
window.addEventListener("beforeprint", () => { opened = [...folded()]; opened.forEach((item) => { item.open = true; }); });
window.addEventListener("afterprint", () => { opened.forEach((item) => { item.open = false; }); });
