//! No circles of modules inside a folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use syn::visit::Visit;

use crate::layers::{attributes, is_of_tests, sources};

/// A module's path in the crate: `["train", "run"]`.
type Module = Vec<String>;

/// Paths that a source names, as their segments, outside tests.
#[derive(Default)]
struct Named(Vec<Vec<String>>);

impl Named {
    fn of(text: &str) -> Result<Self> {
        let mut named = Self::default();
        named.visit_file(&syn::parse_file(text)?);
        Ok(named)
    }

    fn tree(&mut self, before: &[String], tree: &syn::UseTree) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.tree(&with(&path.ident), &path.tree),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(before, tree)),
            syn::UseTree::Name(name) => self.0.push(with(&name.ident)),
            syn::UseTree::Rename(name) => self.0.push(with(&name.ident)),
            syn::UseTree::Glob(_) => self.0.push(before.to_vec()),
        }
    }
}

impl<'ast> Visit<'ast> for Named {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !is_of_tests(attributes(item)) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.0.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        syn::visit::visit_path(self, path);
    }
}

/// The module that a path named in `from` leads to, if it begins with `crate`, `self` or `super`.
fn target(path: &[String], from: &Module, modules: &BTreeSet<Module>) -> Option<Module> {
    let num_up = path.iter().take_while(|name| *name == "super").count();
    let (mut at, rest) = match path.first()?.as_str() {
        "crate" => (Vec::new(), &path[1..]),
        "self" => (from.clone(), &path[1..]),
        _ if num_up > 0 => (from[..from.len().checked_sub(num_up)?].to_vec(), &path[num_up..]),
        _ => return None,
    };
    for name in rest {
        at.push(name.clone());
        if !modules.contains(&at) {
            at.pop();
            break;
        }
    }
    Some(at)
}

/// The groups of names that reach each other.
fn circles(edges: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<Vec<String>> {
    let reached = |from: &String| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(name) = open.pop() {
            open.extend(edges.get(name).into_iter().flatten().filter(|next| seen.insert((*next).clone())));
        }
        seen
    };
    let all: BTreeMap<&String, BTreeSet<String>> = edges.keys().map(|name| (name, reached(name))).collect();
    let circle = |(name, reached): (&&String, &BTreeSet<String>)| {
        let is_mutual = |other: &&String| all.get(other).is_some_and(|back| back.contains(*name));
        reached.contains(*name).then(|| reached.iter().filter(is_mutual).cloned().collect())
    };
    all.iter().filter_map(circle).collect()
}

#[test]
fn modules_of_a_folder_use_each_other_one_way() -> Result<()> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files)?;
    let mut named = BTreeMap::new();
    for file in files {
        let relative = file.strip_prefix(&src)?.with_extension("");
        let mut module: Module = relative.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if module.iter().any(|part| part == "tests") {
            continue;
        }
        if module.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
            module.pop();
        }
        let text = std::fs::read_to_string(&file)?;
        named.insert(module, Named::of(&text).with_context(|| file.display().to_string())?.0);
    }
    let modules: BTreeSet<Module> = named.keys().cloned().collect();
    // By folder: which member names which.
    let mut folders: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for (from, paths) in &named {
        for to in paths.iter().filter_map(|path| target(path, from, &modules)) {
            let num_shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
            let (Some(a), Some(b)) = (from.get(num_shared), to.get(num_shared)) else { continue };
            // The crate's own level is the table of layers.
            if num_shared > 0 {
                let folder = folders.entry(from[..num_shared].join("::")).or_default();
                folder.entry(a.clone()).or_default().insert(b.clone());
            }
        }
    }
    assert!(folders.len() > 15, "only {} folders found", folders.len());
    let found: Vec<(String, Vec<String>)> =
        folders.iter().flat_map(|(folder, edges)| circles(edges).into_iter().map(|c| (folder.clone(), c))).collect();
    assert!(found.is_empty(), "circles: {found:#?}");
    Ok(())
}

#[test]
fn circles_are_found() {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let edges = [("a", vec!["b"]), ("b", vec!["c"]), ("c", vec!["a", "d"]), ("d", vec![]), ("e", vec!["e2"])];
    let edges = edges.map(|(from, to)| (from.to_owned(), names(&to).into_iter().collect()));
    assert_eq!(circles(&edges.into()), [names(&["a", "b", "c"])].into());
}
