"use strict";
// Asks for the page's sections again and again, and changes what has changed: nodes stay, so that focus,
// selection and a click that is under way survive.
(() => {
  const EVERY = 1000;
  const main = document.querySelector("main");
  const news = document.getElementById("news");
  const button = document.getElementById("pause");
  let paused = false;
  let timer = 0;
  let lost = null;

  function morph(old, next) {
    if (old.nodeType !== next.nodeType || old.nodeName !== next.nodeName) {
      old.replaceWith(next.cloneNode(true));
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== next.nodeValue) old.nodeValue = next.nodeValue;
      return;
    }
    for (const { name } of [...old.attributes]) {
      if (!next.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of next.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const children = [...old.childNodes];
    const wanted = [...next.childNodes];
    wanted.forEach((child, place) => {
      if (place < children.length) morph(children[place], child);
      else old.append(child.cloneNode(true));
    });
    children.slice(wanted.length).forEach((child) => child.remove());
  }

  function show(sections) {
    for (const [id, html] of Object.entries(sections)) {
      if (id === "title") {
        if (document.title !== html) document.title = html;
        continue;
      }
      const next = new DOMParser().parseFromString(html, "text/html").body.firstElementChild;
      morph(document.getElementById(id), next);
    }
  }

  function say(text) {
    if (news.textContent !== text) news.textContent = text;
  }

  async function update() {
    try {
      const answer = await fetch(new URL("page.json", location.origin + location.pathname), { cache: "no-store", signal: AbortSignal.timeout(5000) });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      show(await answer.json());
      lost = null;
      main.classList.remove("stale");
      say("Live");
    } catch (error) {
      lost = lost || new Date();
      main.classList.add("stale");
      say(`No answer since ${lost.toLocaleTimeString()}`);
    }
    again();
  }

  function again() {
    clearTimeout(timer);
    if (!paused && !document.hidden) timer = setTimeout(update, EVERY);
  }

  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "Go on" : "Pause";
    say(paused ? "Paused" : "Live");
    again();
  });
  document.addEventListener("visibilitychange", again);
  say("Live");
  again();
})();
