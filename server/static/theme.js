// Before the first paint: the remembered choice between light and dark. Without one, the system's holds.
try {
  const { theme } = JSON.parse(localStorage.getItem('headrace.settings') ?? '{}');
  if (theme === 'light' || theme === 'dark') document.documentElement.dataset.theme = theme;
} catch { /* no storage, or not ours: the system's */ }
