//! Detects the format of the data set at a path and opens it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::folder::{find_people, is_junk};
use super::{FaceFolder, ListedFaces, RecordFaces, ShardFaces};
use crate::data::decode::is_image;
use crate::data::{Dataset, OnBroken};
use crate::error::{Error, Result};
use crate::files::folder_of;

/// Most shards that a pattern may name.
const MAX_SHARDS: usize = 1_000_000;

/// An opened data set, with its format and path.
pub struct Source {
    /// The images.
    pub images: Arc<dyn Dataset>,
    /// Its storage format.
    pub format: Format,
    /// Its path.
    pub path: PathBuf,
    /// What the user should know: what is left out, and what was assumed.
    pub notes: Vec<String>,
}

/// Storage format of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A folder of identities.
    Folder,
    /// A list of image files.
    List,
    /// MXNet's RecordIO.
    RecordIo,
    /// Tar files of samples.
    WebDataset,
    /// Parquet files with columns of images and labels.
    Parquet,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Folder => "folder of identities",
            Self::List => "list of images",
            Self::RecordIo => "RecordIO",
            Self::WebDataset => "WebDataset",
            Self::Parquet => "parquet",
        })
    }
}

impl Source {
    /// Returns the folder in which this set's lists of people and pairs are looked for.
    pub fn folder(&self) -> &Path {
        if self.path.is_dir() && !self.path.ends_with("images") { &self.path } else { folder_of(&self.path) }
    }

    /// Returns the list `name`, such as `pairs.txt`, that belongs to this set, if there is one: `NAME.pairs.txt` beside
    /// `NAME.rec`; or `pairs.txt` in a set's own folder, which holds no other set.
    pub fn beside(&self, name: &str) -> Option<PathBuf> {
        let of_file = || Some(self.path.with_file_name(format!("{}.{name}", self.path.file_stem()?.to_string_lossy())));
        let named = if self.path.is_dir() { None } else { of_file() };
        let in_folder = || Some(self.folder().join(name)).filter(|_| self.path.is_dir() || self.is_alone());
        named.filter(|path| path.is_file()).or_else(in_folder).filter(|path| path.is_file())
    }

    /// Returns a list of pairs that lies beside this set. Without `people.txt`, or where several sets lie, it decides
    /// nothing.
    pub(in crate::data) fn unused_pairs(&self) -> Option<PathBuf> {
        let in_folder = || Some(self.folder().join("pairs.txt")).filter(|path| path.is_file());
        self.beside("pairs.txt").or_else(in_folder)
    }

    /// Returns the verification file that belongs to this set, if there is one: `NAME.bin` beside `NAME.rec` or another
    /// file; or, beside the `.rec` of insightface's sets, `lfw.bin` or else the first of the others.
    pub fn verification_beside(&self) -> Option<PathBuf> {
        let is_bin = |path: &Path| path.extension().is_some_and(|x| x.eq_ignore_ascii_case("bin"));
        let named = Some(self.path.with_extension("bin")).filter(|path| !self.path.is_dir() && path.is_file());
        if named.is_some() || self.format != Format::RecordIo || !self.is_alone() {
            return named;
        }
        let entries = std::fs::read_dir(self.folder()).into_iter().flatten().flatten();
        let files = entries.map(|entry| entry.path()).filter(|path| is_bin(path));
        // `lfw.bin` comes first: it is the most common one.
        files.min_by_key(|path| (!path.ends_with("lfw.bin"), path.clone()))
    }

    /// Whether no other set lies in the folder of this set's file; the shards of a set count as one.
    fn is_alone(&self) -> bool {
        let entries = std::fs::read_dir(folder_of(&self.path)).into_iter().flatten().flatten();
        let files = entries.filter(|entry| !is_junk(&entry.file_name()));
        let kinds = files.map(|entry| extension(&entry.path()));
        let is_shard = |kind: &str| kind == "tar" && self.format == Format::WebDataset;
        let is_set = |kind: &String| matches!(kind.as_str(), "rec" | "tar" | "parquet") && !is_shard(kind);
        // A file is itself one of them.
        kinds.filter(is_set).count() <= usize::from(matches!(self.format, Format::RecordIo | Format::Parquet))
    }
}

impl fmt::Display for Source {
    /// One line for the user.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (images, people) = (self.images.len(), self.images.num_identities());
        write!(f, "{}: {}, {images} images of {people} people", self.path.display(), self.format)?;
        self.notes.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}

/// Opens the data set at `path`: a `.rec` file, a `.tar` file or a pattern of several (`faces-{000000..000009}.tar`), a
/// `.parquet` file, a list of images (`.txt`, `.csv`, `.tsv`, `.lst`), or a folder. A folder may hold a `.rec` file,
/// `.tar` files, `.parquet` files, `images/` beside LFW's lists, or one sub-folder per identity.
///
/// # Errors
/// When nothing is there, the format is unknown or ambiguous, or the data set is broken.
pub fn open_source(path: &Path) -> Result<Source> {
    open_source_with(path, OnBroken::Fail)
}

/// Like [`open_source`], with a policy for files that are truncated: [`OnBroken::Skip`] takes what is complete.
///
/// # Errors
/// Same as [`open_source`].
pub fn open_source_with(path: &Path, on_broken: OnBroken) -> Result<Source> {
    let (format, files) = find(path)?;
    let path = match &files[..] {
        [file] => file.clone(),
        _ => path.to_owned(),
    };
    let mut notes = Vec::new();
    let images: Arc<dyn Dataset> = match format {
        Format::Folder => {
            let folder = FaceFolder::open(&files[0])?;
            notes.extend_from_slice(folder.notes());
            Arc::new(folder)
        }
        Format::List => {
            let list = ListedFaces::open(&files[0])?;
            if list.num_repeated() > 0 {
                notes.push(format!("{} lines repeat an earlier one and are left out", list.num_repeated()));
            }
            Arc::new(list)
        }
        Format::RecordIo => {
            let faces = RecordFaces::open(&files[0])?;
            notes.extend(faces.note().map(str::to_owned));
            Arc::new(faces)
        }
        Format::WebDataset => {
            let shards = ShardFaces::open(&files, on_broken)?;
            if let [first, ..] = shards.cut() {
                notes.push(format!("{} files are taken as far as they go: {first}", shards.cut().len()));
            }
            Arc::new(shards)
        }
        #[cfg(feature = "parquet")]
        Format::Parquet => Arc::new(super::ParquetFaces::open(&files)?),
        #[cfg(not(feature = "parquet"))]
        Format::Parquet => {
            return Err(Error::Data { path, what: crate::error::missing_feature("parquet") });
        }
    };
    Ok(Source { images, format, path, notes })
}

/// Returns the format and its files, at least one.
fn find(path: &Path) -> Result<(Format, Vec<PathBuf>)> {
    let error = |what: String| Error::Data { path: path.to_owned(), what };
    if path.is_dir() {
        return find_in(path);
    }
    if let Some(shards) = expand(path)? {
        return Ok((Format::WebDataset, shards));
    }
    let format = match extension(path).as_str() {
        "rec" => Format::RecordIo,
        "tar" => Format::WebDataset,
        "parquet" => Format::Parquet,
        "txt" | "csv" | "tsv" | "lst" => Format::List,
        "idx" => return find(&path.with_extension("rec")),
        "bin" => {
            let what = "a verification file holds pairs to test on and no names of people: give it as --pairs";
            return Err(error(what.to_owned()));
        }
        _ if !path.exists() => {
            let what = "expected a data set, found nothing there".to_owned();
            return Err(error(what));
        }
        other @ ("gz" | "tgz" | "zst" | "xz" | "bz2" | "zip" | "7z") => {
            return Err(error(format!("expected data that is not compressed, found .{other}: unpack it first")));
        }
        other => {
            let what =
                format!("expected a folder, .rec, .tar, .parquet or a list of images (.txt, .csv), found .{other}");
            return Err(error(what));
        }
    };
    Ok((format, vec![path.to_owned()]))
}

fn find_in(folder: &Path) -> Result<(Format, Vec<PathBuf>)> {
    let error = |what: String| Error::Data { path: folder.to_owned(), what };
    let (mut recs, mut tars, mut parquets) = (Vec::new(), Vec::new(), Vec::new());
    let mut has_images = false;
    // Data sets of the hub have their files in `data/`, or in one folder per split.
    for folder in [folder.to_owned(), folder.join("data")].into_iter().filter(|f| f.is_dir()) {
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let path = entry.map_err(Error::io(&folder))?.path();
            match extension(&path).as_str() {
                _ if path.file_name().is_some_and(is_junk) => {}
                "rec" => recs.push(path),
                "tar" => tars.push(path),
                "parquet" => parquets.push(path),
                _ => has_images |= path.is_dir() && path.ends_with("images"),
            }
        }
    }
    let has_lists = folder.join("pairs.txt").is_file() && folder.join("people.txt").is_file();
    tars.sort_unstable();
    // An archive beside the people is where they came from; an index is a data set's own.
    let num = recs.len() + tars.len() + parquets.len();
    let has_index = recs.iter().any(|path| path.with_extension("idx").is_file());
    if num > 0 && num <= 2 && !has_index && has_people(folder) {
        return Ok((Format::Folder, vec![folder.to_owned()]));
    }
    match (recs.len(), tars.len(), parquets.len()) {
        (0, 0, 0) if has_images && has_lists => Ok((Format::Folder, vec![folder.join("images")])),
        (0, 0, 0) => Ok((Format::Folder, vec![find_people(folder)?])),
        (1, 0, 0) => Ok((Format::RecordIo, recs)),
        (0, _, 0) => Ok((Format::WebDataset, tars)),
        (0, 0, _) => Ok((Format::Parquet, split_of(parquets, "train").map_err(error)?)),
        (recs, tars, parquets) => {
            let what = format!(
                "expected one data set, found {recs} .rec, {tars} .tar and {parquets} .parquet files: give the path of one"
            );
            Err(error(what))
        }
    }
}

/// Whether a folder has two or more sub-folders with images, which are people.
fn has_people(folder: &Path) -> bool {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    let has_images = |path: &Path| entries(path).any(|entry| is_image(&entry.file_name()));
    let folders = entries(folder).filter(|entry| !is_junk(&entry.file_name())).map(|entry| entry.path());
    folders.filter(|path| path.is_dir() && has_images(path)).take(2).count() == 2
}

/// Returns the files of a split, `SPLIT-00000-of-00002.parquet`, if the file names contain names of splits; otherwise
/// all files.
fn split_of(mut files: Vec<PathBuf>, split: &str) -> std::result::Result<Vec<PathBuf>, String> {
    let stem = |path: &PathBuf| path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    files.sort_unstable();
    let is_of = |path: &PathBuf, split: &str| stem(path).split(['-', '_', '.']).any(|part| part == split);
    let names = ["train", "test", "validation", "val"];
    if !files.iter().any(|path| names.iter().any(|name| is_of(path, name))) {
        return Ok(files);
    }
    let found: Vec<String> = files.iter().map(stem).collect();
    files.retain(|path| is_of(path, split));
    if files.is_empty() {
        return Err(format!("expected files of the split {split}, found {found:?}: give the path of one"));
    }
    Ok(files)
}

/// Returns the files of a pattern `NAME{FIRST..LAST}REST`; `None` if the path is not a pattern.
fn expand(path: &Path) -> Result<Option<Vec<PathBuf>>> {
    let text = path.to_string_lossy();
    let Some((before, rest)) = text.split_once('{') else { return Ok(None) };
    let Some((range, after)) = rest.split_once('}') else { return Ok(None) };
    let Some((first, last)) = range.split_once("..") else { return Ok(None) };
    let error = |what: String| Error::Data { path: path.to_owned(), what };
    let number = |text: &str| text.parse::<usize>().map_err(|_| error(format!("expected a number, found {text:?}")));
    let (from, to) = (number(first)?, number(last)?);
    if from > to || to - from >= MAX_SHARDS {
        return Err(error(format!("expected a range of up to {MAX_SHARDS} files, found {range}")));
    }
    let width = first.len();
    Ok(Some((from..=to).map(|number| format!("{before}{number:0width$}{after}").into()).collect()))
}

fn extension(path: &Path) -> String {
    path.extension().map(|x| x.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_their_files() -> Result<()> {
        let files = expand(Path::new("a/f-{008..011}.tar"))?.unwrap_or_default();
        assert_eq!(files, ["a/f-008.tar", "a/f-009.tar", "a/f-010.tar", "a/f-011.tar"].map(PathBuf::from));
        assert_eq!(expand(Path::new("a/f-008.tar"))?, None);
        for wrong in ["f-{3..2}.tar", "f-{0..99999999999}.tar", "f-{a..b}.tar"] {
            assert!(expand(Path::new(wrong)).is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn splits_are_told_by_the_names_of_files() {
        let files = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let both = files(&["test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]);
        assert_eq!(split_of(both, "train"), Ok(files(&["train-00000-of-00001.parquet"])));
        let plain = files(&["0000.parquet", "0001.parquet"]);
        assert_eq!(split_of(plain.clone(), "train"), Ok(plain));
        assert!(split_of(files(&["test.parquet"]), "train").is_err());
    }
}
