//! Downloads data sets of the hub as parquet files, through candle-datasets.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::HubConfig;
use super::client::{builder, endpoint};
use super::download::other_sha256;
use crate::error::{Error, Result};
use crate::weights::hub_file::is_name;
use crate::weights::manifest::is_sha256;
use crate::weights::reference::DATASET_SCHEME;

/// Branch with the parquet files that the hub converts itself.
const REVISION: &str = "refs/convert/parquet";
/// Configuration and split used when none is given.
const DEFAULT: [&str; 2] = ["default", "train"];

/// Implements [`super::Hub::fetch_dataset`].
pub(super) fn fetch(config: &HubConfig, reference: &str) -> Result<PathBuf> {
    let error = |what: String| Error::Hub { reference: reference.to_owned(), what };
    let parts: Vec<&str> =
        reference.strip_prefix(DATASET_SCHEME).unwrap_or_default().trim_end_matches('/').split('/').collect();
    let (owner, name, wanted) = match parts[..] {
        [owner, name] if is_name(owner) && is_name(name) => (owner, name, None),
        [owner, name, part, split] if [owner, name, part, split].into_iter().all(is_name) => {
            (owner, name, Some([part, split]))
        }
        _ => {
            let expected = "hf://datasets/owner/name or hf://datasets/owner/name/configuration/split";
            return Err(error(format!("expected {expected}")));
        }
    };
    let root = config.cache.clone().unwrap_or_else(hf_hub::resolve_cache_dir);
    let repo = root.join(format!("datasets--{owner}--{name}"));
    if snapshot(&repo).is_none() {
        if config.offline {
            let what = format!("not in the cache {}, and offline: fetch it once without --offline", root.display());
            return Err(error(what));
        }
        download(config, root, format!("{owner}/{name}")).map_err(error)?;
    }
    let snapshot = snapshot(&repo).ok_or_else(|| error("the hub has no parquet files of it".to_owned()))?;
    let mut splits = BTreeSet::new();
    let mut files = Vec::new();
    for folder in sub_folders(&snapshot)? {
        for split in sub_folders(&folder)? {
            let found = parquet_files(&split)?;
            if !found.is_empty() {
                splits.insert(split.clone());
                files.extend(found);
            }
        }
    }
    for file in &files {
        check(file).map_err(error)?;
    }
    choose(&splits, wanted).map_err(error)
}

/// Downloads every file of the branch into hf-hub's cache.
fn download(config: &HubConfig, cache: PathBuf, id: String) -> Result<(), String> {
    let endpoint = endpoint(config)?;
    let builder = builder(config, &endpoint)?.cache_dir(cache);
    // The client runs its own async runtime. It needs a thread of its own, because the caller may already be in a
    // runtime.
    let work = move || {
        let client = builder.build_sync().map_err(|e| format!("no HTTPS client: {e}"))?;
        candle_datasets::hub::from_hub(&client, id).map(drop).map_err(|e| e.to_string())
    };
    std::thread::spawn(work).join().unwrap_or_else(|_| Err("the download thread panicked".to_owned()))
}

/// Returns the folder of the branch's last known commit.
fn snapshot(repo: &Path) -> Option<PathBuf> {
    let commit = fs::read_to_string(repo.join("refs").join(REVISION)).ok()?;
    let snapshot = repo.join("snapshots").join(commit.trim());
    (is_name(commit.trim()) && snapshot.is_dir()).then_some(snapshot)
}

fn sub_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(entries(folder)?.into_iter().filter(|path| path.is_dir()).collect())
}

fn parquet_files(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(entries(folder)?.into_iter().filter(|path| path.extension().is_some_and(|x| x == "parquet")).collect())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    entries.map(|entry| Ok(entry.map_err(Error::io(folder))?.path())).collect()
}

/// Checks a file against its SHA-256 where the cache names it by that, as it does for large files.
fn check(file: &Path) -> Result<(), String> {
    let blob = file.canonicalize().map_err(|e| format!("{}: {e}", file.display()))?;
    let Some(expected) = blob.file_name().and_then(|name| name.to_str()).filter(|name| is_sha256(name)) else {
        return Ok(());
    };
    match other_sha256(&blob, expected).map_err(|e| e.to_string())? {
        None => Ok(()),
        Some(found) => {
            let path = file.display();
            Err(format!("{path}: SHA-256: expected {expected}, found {found}; remove it and try again"))
        }
    }
}

/// Returns the folder of the wanted configuration and split, or of the default.
fn choose(splits: &BTreeSet<PathBuf>, wanted: Option<[&str; 2]>) -> Result<PathBuf, String> {
    let names = |path: &Path| {
        let name = |path: Option<&Path>| Some(path?.file_name()?.to_string_lossy().into_owned());
        [name(path.parent()).unwrap_or_default(), name(Some(path)).unwrap_or_default()]
    };
    let with = |[configuration, split]: [&str; 2]| splits.iter().find(|path| names(path) == [configuration, split]);
    let mut of_train = splits.iter().filter(|path| names(path)[1] == DEFAULT[1]);
    let found = match wanted {
        Some(wanted) => with(wanted),
        None => with(DEFAULT).or_else(|| of_train.next().filter(|_| of_train.next().is_none())),
    };
    found.cloned().ok_or_else(|| {
        let all: Vec<String> = splits.iter().map(|path| names(path).join("/")).collect();
        format!(
            "expected a configuration and split of {all:?}, such as {DATASET_SCHEME}owner/name/{}",
            DEFAULT.join("/")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_is_the_one_named_or_the_one_to_train_on() {
        let set = |names: &[&str]| names.iter().map(|name| Path::new("s").join(name)).collect::<BTreeSet<_>>();
        let two = set(&["default/test", "default/train", "tiny/train"]);
        assert_eq!(choose(&two, None), Ok("s/default/train".into()));
        assert_eq!(choose(&two, Some(["tiny", "train"])), Ok("s/tiny/train".into()));
        assert_eq!(choose(&set(&["faces/train", "faces/test"]), None), Ok("s/faces/train".into()));
        let error = choose(&set(&["a/train", "b/train"]), None).expect_err("two of them");
        assert!(error.contains("\"a/train\", \"b/train\""), "{error}");
        assert!(choose(&two, Some(["tiny", "test"])).is_err());
    }
}
