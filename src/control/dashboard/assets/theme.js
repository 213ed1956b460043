// Sets the theme before anything is drawn: light, dark, or as the system says. Loaded in the head, not as a module.
(() => {
  const CHOICES = ["auto", "light", "dark"];
  const root = document.documentElement;
  const stored = () => {
    try {
      return localStorage.getItem("ferry-theme");
    } catch {
      return null; // storage can be switched off
    }
  };
  const set = (choice) => {
    root.dataset.theme = CHOICES.includes(choice) ? choice : "auto";
  };
  set(stored());
  window.ferryTheme = {
    get: () => root.dataset.theme,
    next: () => {
      const choice = CHOICES[(CHOICES.indexOf(root.dataset.theme) + 1) % CHOICES.length];
      set(choice);
      try {
        localStorage.setItem("ferry-theme", choice);
      } catch {
        // then it holds for this page only
      }
      return choice;
    },
  };
})();
