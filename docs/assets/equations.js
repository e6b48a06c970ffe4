// Renders the equations of a page: at once, and after a click that loads the next page in place.
function render(body) {
  renderMathInElement(body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  });
}
render(document.body); // pages that are opened as files never get the event below
document$.subscribe(({ body }) => render(body));
