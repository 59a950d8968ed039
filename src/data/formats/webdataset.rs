//! WebDataset: tar files of samples, each an image `KEY.jpg` and its other members, such as `KEY.cls`.

use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::classes::{Classes, Paths};
use super::export::{Export, ExportImage};
use super::file::RandomFile;
use crate::data::dataset::Dataset;
use crate::data::decode::is_image;
use crate::data::splits::OnBroken;
use crate::error::{Error, Result};
use crate::files::UnfinishedFolder;

/// Most bytes that are read of a label; real ones are far shorter.
const MAX_LABEL_BYTES: u64 = 64 << 10;
/// Size of a tar file's blocks: headers are one, contents are padded to them.
const BLOCK: u64 = 512;
/// Fields of a sample's JSON that may hold its label; the first one present counts.
const LABEL_FIELDS: [&str; 4] = ["label", "cls", "class", "identity"];

/// The faces of tar files as a [`Dataset`], in the order of the files and of the samples in them.
///
/// Memory is 20 bytes and a name per image. Every image has [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS).
pub struct ShardFaces {
    shards: Vec<RandomFile>,
    images: Vec<Place>,
    classes: Classes,
    paths: Paths,
    cut: Vec<String>,
}

/// Position of an image.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    shard: u32,
    len: u32,
}

/// A sample whose members are still being read; they follow each other.
#[derive(Default)]
struct Pending {
    key: String,
    image: Option<(Place, String)>,
    /// An image whose name has points before its extension: its offset and name.
    dotted: Option<(u64, String)>,
    label: Option<String>,
    /// Names from the JSON.
    identity: Option<String>,
    file_name: Option<String>,
}

impl ShardFaces {
    /// Opens tar files. A sample is an image `KEY.jpg` (or another format) with its label in `KEY.cls` or in the field
    /// `label`, `cls`, `class` or `identity` of `KEY.json`; other members are ignored. Of a truncated file,
    /// [`OnBroken::Skip`] keeps the samples that are complete; [`Self::cut`] says so.
    ///
    /// # Errors
    /// When a file cannot be read, is not a tar file, is compressed or truncated, or an image has no label.
    pub fn open(paths: &[PathBuf], on_broken: OnBroken) -> Result<Self> {
        let mut found = Found::default();
        for (path, number) in paths.iter().zip(0..) {
            found.shards.push(RandomFile::open(path)?);
            match (found.read_shard(path, number)?, on_broken) {
                (None, _) => {}
                (Some(cut), OnBroken::Fail) => return Err(cut),
                (Some(cut), OnBroken::Skip) => found.cut.push(cut.to_string()),
            }
        }
        let path = paths.first().map_or(Path::new(""), PathBuf::as_path);
        let classes = Classes::from_labels(found.labels, &found.paths, path)?;
        Ok(Self { shards: found.shards, images: found.images, classes, paths: found.paths, cut: found.cut })
    }

    /// Returns a message for each file that is truncated.
    pub fn cut(&self) -> &[String] {
        &self.cut
    }
}

#[derive(Default)]
struct Found {
    shards: Vec<RandomFile>,
    images: Vec<Place>,
    labels: Vec<String>,
    paths: Paths,
    cut: Vec<String>,
    /// Names of the samples of the file that is read.
    keys: Vec<String>,
}

impl Found {
    /// Reads a tar file; returns the error of one that is truncated.
    fn read_shard(&mut self, path: &Path, shard: u32) -> Result<Option<Error>> {
        let len = self.shards[shard as usize].len();
        let wrong = |offset: u64, what: String| Error::Format { path: path.to_owned(), offset, what };
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        let mut archive = tar::Archive::new(BufReader::new(file));
        let (mut pending, first) = (Pending::default(), self.images.len());
        self.keys.clear();
        let compression = self.compression(shard);
        let not_tar = |e: std::io::Error, at: u64| match (at, compression) {
            (0, Some(kind)) => wrong(0, format!("expected a tar file that is not compressed, found {kind} data")),
            (0, None) => wrong(0, format!("expected a tar file, found something else ({e})")),
            (at, _) => {
                wrong(at, format!("expected a member's header, found something else: the file is damaged ({e})"))
            }
        };
        let cut = |what: String| {
            let what = format!(
                "{what}: the file is truncated (with data.on_broken = \"skip\" a training takes the samples \
                               before the last one, which may lack something)"
            );
            Ok(Some(wrong(len, what)))
        };
        // Where the member after the last one begins.
        let mut end = 0;
        for entry in archive.entries_with_seek().map_err(|e| not_tar(e, 0))? {
            let mut entry = match entry {
                Ok(entry) => entry,
                Err(_) if end > 0 && end + BLOCK > len => {
                    return cut(format!("expected a member's header of {BLOCK} bytes at byte {end}"));
                }
                Err(e) => return Err(not_tar(e, end)),
            };
            let kind = entry.header().entry_type();
            if kind == tar::EntryType::GNUSparse {
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                let what =
                    format!("{name} is stored as a sparse file, which is not read: write it whole (tar without -S)");
                return Err(wrong(entry.raw_file_position(), what));
            }
            let after = entry.raw_file_position().checked_add(entry.size());
            end = after.and_then(|after| after.checked_next_multiple_of(BLOCK)).ok_or_else(|| {
                wrong(entry.raw_file_position(), format!("a member of {} bytes is out of range", entry.size()))
            })?;
            if matches!(kind, tar::EntryType::Link | tar::EntryType::Symlink) {
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                let what = format!(
                    "{name} is a link, which is not followed: write the file itself (tar -h --hard-dereference)"
                );
                return Err(wrong(entry.raw_file_position(), what));
            }
            if kind != tar::EntryType::Regular {
                continue;
            }
            let (offset, size) = (entry.raw_file_position(), entry.size());
            if offset.checked_add(size).is_none_or(|end| end > len) {
                // The sample that it belongs to, or the one before, may lack it.
                return cut(format!("expected {size} bytes at byte {offset}, found the end of the file"));
            }
            let name = String::from_utf8(entry.path_bytes().into_owned())
                .map_err(|_| wrong(offset, "expected names in UTF-8".to_owned()))?;
            let Some((key, extension)) = split_key(&name) else { continue };
            if key != pending.key {
                self.push(
                    std::mem::replace(&mut pending, Pending { key: key.to_owned(), ..Pending::default() }),
                    path,
                )?;
            }
            let extension = extension.to_ascii_lowercase();
            if let Some((_, last)) = extension.rsplit_once('.')
                && is_image_extension(last)
            {
                pending.dotted.get_or_insert((offset, name.clone()));
            }
            if is_image_extension(&extension) {
                if let Some((_, before)) = &pending.image {
                    let what = format!("{name}: expected one image of {key}, found one of {before} too");
                    return Err(wrong(offset, what));
                }
                let len =
                    u32::try_from(size).map_err(|_| wrong(offset, format!("a {size}-byte image is too large")))?;
                pending.image = Some((Place { offset, shard, len }, extension));
            } else if matches!(extension.as_str(), "cls" | "json") {
                let mut text = Vec::new();
                if size > MAX_LABEL_BYTES {
                    let what = format!("{name}: expected a label of up to {MAX_LABEL_BYTES} bytes, found {size}");
                    return Err(wrong(offset, what));
                }
                entry.by_ref().read_to_end(&mut text).map_err(Error::io(path))?;
                if extension == "cls" {
                    pending.label = Some(String::from_utf8_lossy(&text).trim().to_owned());
                } else {
                    pending.read_json(&text).map_err(|what| wrong(offset, format!("{name}: {what}")))?;
                }
            }
        }
        // An archive ends with two blocks of zeros; without them the file may have been cut after any member, so that
        // the last sample may lack a name or a label.
        let closing = self.shards[shard as usize].read_up_to(end, 2 * BLOCK as usize)?;
        if closing.len() < 2 * BLOCK as usize || closing.iter().any(|&byte| byte != 0) {
            return cut(format!("expected {} bytes of zeros at byte {end}, the end of the archive", 2 * BLOCK));
        }
        self.push(pending, path)?;
        self.check_names(first, path)?;
        self.data_after(shard, end + 2 * BLOCK).map(|at| {
            let what = "expected nothing after the end of the archive, found data: it is damaged, or several archives \
                        were joined (with data.on_broken = \"skip\" a training takes what is before)";
            at.map(|at| wrong(at, what.to_owned()))
        })
    }

    /// Returns the kind of compression that a file begins with, if any.
    fn compression(&self, shard: u32) -> Option<&'static str> {
        let head = self.shards[shard as usize].read_up_to(0, 6).ok()?;
        let kinds: [(&[u8], &str); 4] =
            [(b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd")];
        kinds.into_iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, kind)| kind)
    }

    /// Returns where there is anything but zeros from byte `from` on, if anywhere.
    fn data_after(&self, shard: u32, from: u64) -> Result<Option<u64>> {
        let mut at = from;
        loop {
            let bytes = self.shards[shard as usize].read_up_to(at, 1 << 16)?;
            if let Some(place) = bytes.iter().position(|&byte| byte != 0) {
                return Ok(Some(at + place as u64));
            }
            if bytes.is_empty() {
                return Ok(None);
            }
            at += bytes.len() as u64;
        }
    }

    /// Checks that no two samples of a file, which start at number `first`, have one name: an archive that a corrected
    /// sample was appended to holds the old one too.
    fn check_names(&self, first: usize, path: &Path) -> Result<()> {
        let mut order: Vec<usize> = (0..self.keys.len()).collect();
        order.sort_by_key(|&i| &self.keys[i]);
        match order.windows(2).find(|pair| self.keys[pair[0]] == self.keys[pair[1]]) {
            Some(pair) => {
                let [before, again] = [pair[0], pair[1]].map(|i| self.images[first + i].offset);
                let what = format!("expected each sample once, found {} at byte {before} too", self.keys[pair[0]]);
                Err(Error::Format { path: path.to_owned(), offset: again, what })
            }
            None => Ok(()),
        }
    }

    /// Adds a complete sample; one without an image is ignored.
    fn push(&mut self, sample: Pending, path: &Path) -> Result<()> {
        let Some((place, extension)) = sample.image else {
            let Some((offset, name)) = sample.dotted else { return Ok(()) };
            let what = format!(
                "{name}: expected a name with one point, since the format takes all after the first for the extension"
            );
            return Err(Error::Format { path: path.to_owned(), offset, what });
        };
        let Some(label) = sample.label.filter(|label| !label.is_empty()) else {
            let what = format!(
                "expected the label of {0}.{extension} in {0}.cls or {0}.json beside it, found none (tar --sort=name puts \
                 the members of a sample together)",
                sample.key
            );
            return Err(Error::Format { path: path.to_owned(), offset: place.offset, what });
        };
        let (folder, stem) = sample.key.rsplit_once('/').unwrap_or(("", &sample.key));
        let folder = sample.identity.as_deref().unwrap_or(folder);
        let file_name = sample.file_name.unwrap_or_else(|| format!("{stem}.{extension}"));
        self.paths.push(&if folder.is_empty() { file_name } else { format!("{folder}/{file_name}") });
        self.images.push(place);
        self.labels.push(label);
        self.keys.push(sample.key);
        Ok(())
    }
}

impl Pending {
    fn read_json(&mut self, text: &[u8]) -> std::result::Result<(), String> {
        let json: serde_json::Value = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        let string = |field: &str| match json.get(field) {
            Some(serde_json::Value::String(text)) => Some(text.clone()),
            Some(serde_json::Value::Number(number)) => Some(number.to_string()),
            _ => None,
        };
        self.identity = string("identity");
        self.file_name = string("file_name");
        if self.label.is_none() {
            self.label = LABEL_FIELDS.into_iter().find_map(string);
        }
        Ok(())
    }
}

/// Splits a member's name into key and extension at the first dot of its file name, as the `webdataset` package does.
fn split_key(name: &str) -> Option<(&str, &str)> {
    let start = name.rfind('/').map_or(0, |slash| slash + 1);
    let point = start + name[start..].find('.')?;
    (point > start).then(|| (&name[..point], &name[point + 1..]))
}

fn is_image_extension(extension: &str) -> bool {
    !extension.contains('.') && is_image(format!("x.{extension}").as_ref())
}

impl Dataset for ShardFaces {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn num_identities(&self) -> usize {
        self.classes.num_identities()
    }

    fn label(&self, index: usize) -> u32 {
        self.classes.label(index)
    }

    fn name(&self, index: usize) -> String {
        let shard = &self.shards[self.images[index].shard as usize];
        format!("{}, {}", shard.path().display(), self.paths.get(index))
    }

    fn identity_name(&self, label: u32) -> String {
        self.classes.name(label)
    }

    fn file_name(&self, index: usize) -> Option<String> {
        Some(self.paths.file_name(index).to_owned())
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        let place = self.images[index];
        self.shards[place.shard as usize].read(place.offset, place.len as usize).map(Some)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        Some(self.images[index].len.into())
    }
}

/// Writes `FOLDER/faces-000000.tar` and so on with `shard_size` images in each, as `PERSON/IMAGE.jpg` and
/// `PERSON/IMAGE.cls`. If a name has dots that would cut its key short, or differs from another one in its extension
/// alone, the sample becomes `NUMBER.jpg`, `NUMBER.cls` and a `NUMBER.json` with the name. An interrupted export leaves
/// an `UnfinishedFolder`, with which the same export goes on.
///
/// # Errors
/// When the folder exists, an image cannot be read or a file cannot be written; the folder is then not created.
pub fn write_shards(export: &mut Export, folder: &Path, shard_size: usize) -> Result<()> {
    let shard_size = shard_size.max(1);
    let unfinished = UnfinishedFolder::open(folder, &export.key(&format!("to shards of {shard_size}"))?)?;
    match write_into(export, &unfinished, folder, shard_size) {
        Ok(()) => unfinished.finish(),
        Err(error) => Err(unfinished.discard_for(error)),
    }
}

fn write_into(export: &mut Export, unfinished: &UnfinishedFolder, folder: &Path, shard_size: usize) -> Result<()> {
    let name = |number: usize| format!("faces-{number:06}.tar");
    let path_of = |number: usize| unfinished.path().join(name(number));
    // Shards get their names once they are complete. The last may have fewer images; then nothing is left to write.
    let mut num_shards = 0;
    while path_of(num_shards).is_file() {
        num_shards += 1;
    }
    let mut count = (num_shards * shard_size).min(export.len());
    export.go_on_after(count);
    let shared = export.with_shared_stems();
    let mut shard: Option<tar::Builder<BufWriter<NamedTempFile>>> = None;
    export.for_each(&mut |image| {
        if count.is_multiple_of(shard_size) {
            if let Some(shard) = shard.take() {
                close(shard, &path_of(num_shards))?;
                num_shards += 1;
            }
            shard = Some(tar::Builder::new(BufWriter::new(crate::files::temporary(&path_of(num_shards))?)));
        }
        let shard = shard.as_mut().expect("made above");
        append(shard, count, &image, shared.contains(&count)).map_err(Error::io(&folder.join(name(num_shards))))?;
        count += 1;
        Ok(())
    })?;
    shard.map_or(Ok(()), |shard| close(shard, &path_of(num_shards)))
}

fn close(shard: tar::Builder<BufWriter<NamedTempFile>>, path: &Path) -> Result<()> {
    let file = shard.into_inner().and_then(|out| out.into_inner().map_err(|e| e.into_error()));
    crate::files::persist(file.map_err(Error::io(path))?, path)
}

/// Adds a sample, under its number if its name `is_shared` with another but for the extension.
fn append(
    builder: &mut tar::Builder<impl Write>,
    number: usize,
    image: &ExportImage,
    is_shared: bool,
) -> std::io::Result<()> {
    let path = image.path();
    let mut add = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes)
    };
    let is_plain = !is_shared && split_key(&path).is_some_and(|(_, extension)| is_image_extension(extension));
    let key = match path.rsplit_once('.') {
        Some((key, _)) if is_plain => key.to_owned(),
        _ => format!("{number:09}"),
    };
    let extension = path.rsplit('.').next().unwrap_or_default();
    add(format!("{key}.{extension}"), &image.bytes)?;
    add(format!("{key}.cls"), image.label.to_string().as_bytes())?;
    if !is_plain {
        let json = serde_json::json!({"identity": image.identity, "file_name": image.file_name});
        add(format!("{key}.json"), json.to_string().as_bytes())?;
    }
    Ok(())
}
