//! The picture of the layers as a table; any other edge fails.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Modules that every other may use.
const COMMON: [&str; 2] = ["error", "parallel"];
/// Module, and what it may use of this crate besides [`COMMON`].
const ALLOWED: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    (
        "cli",
        &[
            "train",
            "report",
            "eval",
            "models",
            "data",
            "weights",
            "preprocessing",
            "workers",
            "machine",
            "files",
            "npy",
        ],
    ),
    ("report", &["eval", "files"]),
    (
        "train",
        &[
            "losses",
            "optim",
            "eval",
            "models",
            "data",
            "weights",
            "nn",
            "ops",
            "machine",
            "gpu",
            "preprocessing",
            "files",
            "tensorboard",
        ],
    ),
    ("eval", &["models", "data", "ops", "files", "lists", "npy"]),
    ("losses", &["nn", "ops", "gpu", "testing"]),
    ("optim", &["nn", "ops", "gpu"]),
    ("models", &["nn", "ops", "weights", "preprocessing", "machine", "gpu", "files"]),
    ("nn", &["ops", "gpu", "testing"]),
    ("machine", &["gpu", "ops"]),
    ("gpu", &["ops", "testing"]),
    ("ops", &[]),
    ("data", &["preprocessing", "pickle", "files", "lists"]),
    ("weights", &["pickle", "preprocessing", "files", "protobuf"]),
    ("preprocessing", &[]),
    ("pickle", &[]),
    ("error", &[]),
    ("parallel", &[]),
    ("files", &[]),
    ("lists", &[]),
    ("npy", &[]),
    ("protobuf", &[]),
    ("tensorboard", &["protobuf"]),
    ("workers", &[]),
    ("testing", &[]),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// The modules named in `crate::name` or `maskinv::name` outside comments.
fn used_modules(text: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for line in text.lines().map(|l| l.split("//").next().unwrap_or_default()) {
        for prefix in ["crate::", "maskinv::"] {
            for (at, _) in line.match_indices(prefix) {
                let rest = &line[at + prefix.len()..];
                let name: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
                if !name.is_empty() && !rest[name.len()..].starts_with(|c: char| c.is_ascii_alphanumeric()) {
                    used.insert(name);
                }
            }
        }
    }
    used
}

#[test]
fn layers_point_down_only() -> Result<()> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files)?;
    assert!(files.len() > 50, "only {} sources found", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let relative = file.strip_prefix(&src)?;
        let first = relative.components().next().context("empty path")?.as_os_str().to_string_lossy().into_owned();
        let module = first.trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let allowed = ALLOWED.iter().find(|(name, _)| *name == module);
        let (_, allowed) = allowed.with_context(|| format!("{module} is not in the table of layers"))?;
        for used in used_modules(&std::fs::read_to_string(&file)?) {
            let is_module = ALLOWED.iter().any(|(name, _)| *name == used);
            if is_module && used != module && !COMMON.contains(&used.as_str()) && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{} uses {used}", relative.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "edges that are not in the picture: {wrong:#?}");
    Ok(())
}

#[test]
fn only_the_command_line_prints() -> Result<()> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files)?;
    let prints = |text: &str| {
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        ["println!(", "print!(", "dbg!(", "std::env::var"].iter().any(|p| code.contains(p))
    };
    let allowed = |file: &Path| file.starts_with(src.join("cli")) || file.file_name().is_some_and(|n| n == "tests.rs");
    let wrong: Vec<_> =
        files.iter().filter(|f| !allowed(f) && prints(&std::fs::read_to_string(f).unwrap_or_default())).collect();
    assert!(wrong.is_empty(), "these print or read the environment: {wrong:?}");
    Ok(())
}

#[test]
fn used_modules_are_found() {
    let text = "use crate::nn::{A, B}; // crate::cli\nlet x = maskinv::eval::table(&[]); crate::Error::X";
    assert_eq!(used_modules(text), ["nn", "eval"].map(String::from).into());
}
