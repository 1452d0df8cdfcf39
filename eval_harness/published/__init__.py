"""Values that papers print, beside ours: `values` reads them, `run` measures ours by lmms-eval."""
