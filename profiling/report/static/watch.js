// Keeps the page as the run goes on: asks for its strip, and for the report again when the strip names another version of it.
// What is the same stays: nodes are patched, not replaced, so that scrolling, open sections and the focus remain.

const strip = document.getElementById("strip"), lost = document.getElementById("lost");
let timer = 0, asking = false;

function patch(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== Node.ELEMENT_NODE || old.nodeName !== fresh.nodeName) return old.replaceWith(document.adoptNode(fresh));
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const children = [...fresh.childNodes];
  [...old.childNodes].forEach((child, index) => (index < children.length ? patch(child, children[index]) : child.remove()));
  old.append(...children.slice(old.childNodes.length));
}

async function load(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(15000) });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  return new DOMParser().parseFromString(text, "text/html");
}

async function ask() {
  clearTimeout(timer);
  if (asking || document.hidden) return;
  asking = true;
  let waitS = 5;
  try {
    const fresh = (await load("/strip")).body.firstElementChild;
    const { page, title, pollS } = fresh.dataset;
    if (page !== document.body.dataset.page) {
      const report = await load("/");
      for (const part of ["header", "main", "footer"]) patch(document.querySelector(`body > ${part}`), report.querySelector(`body > ${part}`));
      document.body.dataset.page = report.body.dataset.page;
    }
    if (strip.firstElementChild?.nodeName === "DIV") patch(strip.firstElementChild, fresh);
    else strip.replaceChildren(fresh);
    document.title = title;
    lost.textContent = "";
    waitS = Number(pollS);
  } catch (error) {
    lost.textContent = `fastdistil watch gives no answer (${String(error.message).trim()}); what is shown may be old. Trying again.`;
  }
  asking = false;
  timer = setTimeout(ask, 1000 * waitS);
}

document.addEventListener("visibilitychange", ask);
ask();
