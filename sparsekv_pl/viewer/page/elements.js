"use strict";

const get = (id) => document.getElementById(id);
const percent = (share) => `${Math.round(100 * share)} %`;
const number = (value) => value.toLocaleString("en-GB", { maximumSignificantDigits: 3 });

function make(name, text = "", properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  if (text) made.textContent = text;
  return made;
}

function shade(element, share) {
  element.style.setProperty("--share", Math.abs(share));
  element.classList.toggle("minus", share < 0);
}
