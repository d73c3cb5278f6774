"""The paper's tables as data: settings and printed values, one TOML each."""
