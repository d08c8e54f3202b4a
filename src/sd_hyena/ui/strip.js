element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-number]");
  if (button) trigger("pick", { number: Number(button.dataset.number) });
});
