//! The picture of the layers as a table; any other edge fails.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::visit::Visit;

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
            "records",
            "eval",
            "face",
            "gallery",
            "models",
            "data",
            "weights",
            "preprocessing",
            "workers",
            "vectors",
            "machine",
            "dist",
            "files",
            "npy",
        ],
    ),
    ("report", &["records", "eval", "models", "preprocessing", "files"]),
    ("records", &["eval", "files", "tensorboard"]),
    (
        "train",
        &[
            "records",
            "losses",
            "optim",
            "eval",
            "models",
            "data",
            "weights",
            "nn",
            "ops",
            "machine",
            "dist",
            "preprocessing",
            "files",
            "tensorboard",
        ],
    ),
    ("eval", &["models", "data", "ops", "files", "lists", "npy"]),
    ("face", &["models", "data", "nn", "ops", "weights", "preprocessing", "files"]),
    ("gallery", &["models", "ops", "preprocessing", "files"]),
    ("losses", &["nn", "ops", "dist"]),
    ("optim", &["models", "nn", "ops", "testing"]),
    ("models", &["nn", "ops", "dist", "weights", "preprocessing", "machine", "files", "testing"]),
    ("nn", &["ops", "gpu", "dist", "testing"]),
    ("machine", &["gpu", "ops", "dist"]),
    ("gpu", &["ops", "dist", "testing"]),
    ("ops", &["dist", "testing", "vectors"]),
    ("data", &["preprocessing", "vectors", "pickle", "files", "lists"]),
    ("weights", &["pickle", "preprocessing", "files", "protobuf"]),
    ("preprocessing", &[]),
    ("pickle", &[]),
    ("dist", &[]),
    ("error", &[]),
    ("parallel", &[]),
    ("files", &[]),
    ("lists", &[]),
    ("npy", &[]),
    ("protobuf", &[]),
    ("tensorboard", &["protobuf"]),
    ("vectors", &[]),
    ("workers", &[]),
    ("testing", &[]),
];

pub fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
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
        let text = std::fs::read_to_string(&file)?;
        // Lists are not read below.
        assert!(!text.contains("crate::{"), "{}: name each module in a use of its own", relative.display());
        for used in used_modules(&text) {
            let is_module = ALLOWED.iter().any(|(name, _)| *name == used);
            if is_module && used != module && !COMMON.contains(&used.as_str()) && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{} uses {used}", relative.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "edges that are not in the picture: {wrong:#?}");
    Ok(())
}

/// What a source file does that only the command line may: print, or read the environment. Items under `#[cfg(test)]`
/// are passed over; their modules in files of their own are named.
#[derive(Default)]
struct Printing {
    found: Vec<String>,
    test_modules: Vec<String>,
}

impl Printing {
    fn of(text: &str) -> Result<Self> {
        let mut printing = Self::default();
        printing.visit_file(&syn::parse_file(text)?);
        Ok(printing)
    }
}

pub fn is_of_tests(attributes: &[syn::Attribute]) -> bool {
    let is_test = |list: &syn::MetaList| list.tokens.to_string() == "test";
    attributes.iter().any(|a| a.path().is_ident("cfg") && a.meta.require_list().is_ok_and(is_test))
}

pub fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    use syn::Item;
    match item {
        Item::Const(i) => &i.attrs,
        Item::Enum(i) => &i.attrs,
        Item::Fn(i) => &i.attrs,
        Item::Impl(i) => &i.attrs,
        Item::Macro(i) => &i.attrs,
        Item::Mod(i) => &i.attrs,
        Item::Static(i) => &i.attrs,
        Item::Struct(i) => &i.attrs,
        Item::Trait(i) => &i.attrs,
        Item::Type(i) => &i.attrs,
        Item::Use(i) => &i.attrs,
        _ => &[],
    }
}

impl<'ast> Visit<'ast> for Printing {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !is_of_tests(attributes(item)) {
            return syn::visit::visit_item(self, item);
        }
        if let syn::Item::Mod(module) = item
            && module.content.is_none()
        {
            self.test_modules.push(module.ident.to_string());
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_of_tests(&function.attrs) {
            syn::visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let name = call.path.segments.last().map(|segment| segment.ident.to_string()).unwrap_or_default();
        if ["println", "print", "eprintln", "eprint", "dbg"].contains(&name.as_str()) {
            self.found.push(format!("{name}!"));
        }
        // What a macro is given is not parsed.
        let inside = call.tokens.to_string();
        let hidden = ["println !", "print !", "dbg !", "env :: var", "io :: stdout", "io :: stderr"];
        self.found.extend(hidden.iter().filter(|p| inside.contains(**p)).map(|p| format!("{p} in {name}!")));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        let ends = |with: [&str; 2]| names.windows(2).any(|pair| pair[0] == with[0] && pair[1] == with[1]);
        for way in [["env", "var"], ["env", "var_os"], ["env", "vars"], ["io", "stdout"], ["io", "stderr"]] {
            if ends(way) {
                self.found.push(way.join("::"));
            }
        }
        syn::visit::visit_path(self, path);
    }
}

#[test]
fn only_the_command_line_prints() -> Result<()> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files)?;
    assert!(files.len() > 50, "only {} sources found", files.len());
    let (mut of_tests, mut checked) = (BTreeSet::new(), Vec::new());
    for file in files {
        let printing = Printing::of(&std::fs::read_to_string(&file)?).with_context(|| file.display().to_string())?;
        let is_folder = file.file_stem().is_some_and(|stem| ["mod", "lib", "main"].iter().any(|name| stem == *name));
        let folder = if is_folder { file.parent().context("a folder")?.to_owned() } else { file.with_extension("") };
        for module in &printing.test_modules {
            of_tests.extend([folder.join(module).with_extension("rs"), folder.join(module).join("mod.rs")]);
        }
        checked.push((file, printing.found));
    }
    let is_allowed = |file: &PathBuf| file.starts_with(src.join("cli")) || of_tests.contains(file);
    // CUDA's own variables say where its libraries lie and whether calls are waited for, in every program.
    let is_of_cuda = |file: &PathBuf, found: &[String]| {
        file.starts_with(src.join("gpu/cuda")) && found.iter().all(|found| found == "env::var_os")
    };
    let is_wrong = |file, found: &[String]| !found.is_empty() && !is_allowed(file) && !is_of_cuda(file, found);
    let wrong: Vec<_> = checked.iter().filter(|(file, found)| is_wrong(file, found)).collect();
    assert!(wrong.is_empty(), "these print or read the environment: {wrong:#?}");
    Ok(())
}

#[test]
fn printing_is_found_wherever_it_is_but_in_tests() -> Result<()> {
    let text = "#[cfg(test)]\nuse x::y;\nfn a() { println!(\"}\"); let _ = std::env::var(\"A\"); }\n\
                #[cfg(test)]\n#[allow(dead_code)]\npub(crate) mod tests { fn b() { dbg!(1); } }\n\
                #[cfg(test)]\nmod other;\nfn c() { assert!({ print!(\"\"); true }); }";
    let printing = Printing::of(text)?;
    assert_eq!(printing.found, ["println!", "env::var", "print ! in assert!"]);
    assert_eq!(printing.test_modules, ["other"]);
    Ok(())
}

#[test]
fn used_modules_are_found() {
    let text = "use crate::nn::{A, B}; // crate::cli\nlet x = maskinv::eval::table(&[]); crate::Error::X";
    assert_eq!(used_modules(text), ["nn", "eval"].map(String::from).into());
}
