//! Settings by name.

use super::config::Config;
use crate::error::{Error, Result};

/// Presets by name. The first line of each file says what the preset is for.
const PRESETS: [(&str, &str); 9] = [
    ("procedural", include_str!("presets/procedural.toml")),
    ("lfw-small", include_str!("presets/lfw-small.toml")),
    ("lfw-w600k", include_str!("presets/lfw-w600k.toml")),
    ("casia-r50-w600k", include_str!("presets/casia-r50-w600k.toml")),
    ("ms1mv3-r100-auraface", include_str!("presets/ms1mv3-r100-auraface.toml")),
    ("webface4m-mbf-adaface", include_str!("presets/webface4m-mbf-adaface.toml")),
    ("casia-r50", include_str!("presets/casia-r50.toml")),
    ("ms1mv2-r100-lg", include_str!("presets/ms1mv2-r100-lg.toml")),
    ("ms1mv2-r100-hg", include_str!("presets/ms1mv2-r100-hg.toml")),
];

/// Returns the name and purpose of each preset.
pub fn preset_names() -> impl Iterator<Item = (&'static str, &'static str)> {
    PRESETS.iter().map(|(name, text)| (*name, text.lines().next().unwrap_or_default().trim_start_matches("# ")))
}

/// Returns the preset `name`.
///
/// # Errors
/// When the preset is unknown; lists the known ones.
pub fn preset(name: &str) -> Result<Config> {
    match PRESETS.iter().find(|(n, _)| *n == name) {
        Some((_, text)) => Config::parse(text).map_err(|e| Error::Config(format!("preset {name}: {e}"))),
        None => {
            let known: Vec<&str> = preset_names().map(|(n, _)| n).collect();
            Err(Error::Config(format!("no preset {name}; there are {}", known.join(", "))))
        }
    }
}
