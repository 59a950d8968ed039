//! The gallery's file: its creation, version and model, and what keeps it whole.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};
use serde::{Deserialize, Serialize};

use super::column::{self, Column};
use crate::error::{Error, Result};
use crate::files::{folder_of, private_temporary, remove_if_there, sync_folder};
use crate::models::{ComputedWith, MaskHead};

/// SQLite's field for what a file is: `msgl`.
const APPLICATION: i32 = 0x6d73_676c;
/// Version of the tables.
const VERSION: i32 = 1;
/// Longest embeddings.
const MAX_DIM: usize = 1 << 16;
/// Bytes of a page. A face of 512 elements takes over 2,200, so that pages of SQLite's usual 4,096 would be half empty.
const PAGE_BYTES: u32 = 16_384;
/// How long a writer waits for another process's.
const WAIT: Duration = Duration::from_secs(60);
/// The tables of version 1.
const TABLES: &str = "
CREATE TABLE gallery (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE people (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE faces (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    person INTEGER NOT NULL REFERENCES people (id),
    embedding BLOB NOT NULL,
    image BLOB NOT NULL,
    source TEXT NOT NULL,
    enrolled INTEGER NOT NULL,
    score REAL,
    side REAL,
    sharpness REAL NOT NULL,
    mask REAL,
    checksum INTEGER NOT NULL,
    UNIQUE (person, image)
) STRICT;
";

/// The network whose embeddings a gallery holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GalleryModel {
    /// Name of the network's file, for people.
    pub name: String,
    /// Length of an embedding.
    pub embedding_size: usize,
    /// What the embeddings depend on.
    pub computed_with: ComputedWith,
}

impl GalleryModel {
    /// Says in what the embeddings of another network are not comparable, if they are not. Another precision is no such
    /// difference.
    fn difference(&self, other: &Self) -> Option<String> {
        let (ours, theirs) = (&self.computed_with, &other.computed_with);
        let short = |digest: &str| digest.chars().take(12).collect::<String>();
        if ours.weights != theirs.weights || self.embedding_size != other.embedding_size {
            let named = |model: &Self| {
                let GalleryModel { name, embedding_size, computed_with } = model;
                format!("{name} ({embedding_size} elements, weights {})", short(&computed_with.weights))
            };
            return Some(format!("expected embeddings of {}, found those of {}", named(self), named(other)));
        }
        (ours.preprocessing != theirs.preprocessing)
            .then(|| format!("expected preprocessing {}, found {}", ours.preprocessing, theirs.preprocessing))
    }
}

/// What a gallery holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GalleryInfo {
    /// The network of its embeddings.
    pub model: GalleryModel,
    /// Number of people.
    pub num_people: usize,
    /// Number of faces.
    pub num_faces: usize,
    /// Number of faces with a mask; none if that is not known of any.
    pub num_masked: Option<usize>,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes of the file that removals left free; they hold zeros.
    pub free_bytes: u64,
    /// Version of the tables.
    pub version: i32,
}

/// A gallery that is open. Several processes may have one open, and one of them at a time writes: others wait for it.
#[derive(Debug)]
pub struct Gallery {
    path: PathBuf,
    pub(super) db: Connection,
    model: GalleryModel,
}

impl Gallery {
    /// Opens a gallery.
    ///
    /// # Errors
    /// When there is none, the file is none, or was written by a newer version.
    pub fn open(path: &Path) -> Result<Self> {
        let wrong = |found: &str| gallery_error(path, not_a_gallery(found));
        let data = match std::fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(wrong("no such file")),
            data => data.map_err(Error::io(path))?,
        };
        if data.is_dir() || data.len() == 0 {
            return Err(wrong(if data.is_dir() { "a folder" } else { "an empty file" }));
        }
        // As SQLite does with its log, so that the columns lie beside the file and not beside a link to it.
        let path = path.canonicalize().map_err(Error::io(path))?;
        let db = connect(&path)?;
        let model = read(&path, &db)?;
        Ok(Self { path, db, model })
    }

    /// Opens a gallery of the network `model`, or makes it if there is no file. Only its owner may read it.
    ///
    /// # Errors
    /// As [`Self::open`], when it cannot be made, or when its embeddings are those of another network.
    pub fn open_or_create(path: &Path, model: &GalleryModel) -> Result<Self> {
        if !path.exists() {
            create(path, model)?;
        }
        let gallery = Self::open(path)?;
        gallery.check_model(model)?;
        Ok(gallery)
    }

    /// Checks that embeddings of a network can be compared with the gallery's.
    ///
    /// # Errors
    /// Says what differs.
    pub fn check_model(&self, model: &GalleryModel) -> Result<()> {
        match self.model.difference(model) {
            Some(what) => Err(self.wrong(what)),
            None => Ok(()),
        }
    }

    /// The gallery's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The network of the embeddings.
    pub fn model(&self) -> &GalleryModel {
        &self.model
    }

    /// Returns what the gallery holds.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn info(&self) -> Result<GalleryInfo> {
        let num_masked = match self.number("SELECT count(mask) FROM faces")? {
            0 => None,
            _ => Some(self.number(&format!("SELECT count(*) FROM faces WHERE mask >= {}", MaskHead::WORN))? as usize),
        };
        let page = self.number("PRAGMA page_size")?;
        Ok(GalleryInfo {
            model: self.model.clone(),
            num_people: self.num_people()?,
            num_faces: self.number("SELECT count(*) FROM faces")? as usize,
            num_masked,
            bytes: self.number("PRAGMA page_count")? * page,
            free_bytes: self.number("PRAGMA freelist_count")? * page,
            version: VERSION,
        })
    }

    /// Number of people.
    pub(super) fn num_people(&self) -> Result<usize> {
        Ok(self.number("SELECT count(*) FROM people")? as usize)
    }

    /// Returns a number of things.
    fn number(&self, sql: &str) -> Result<u64> {
        self.db.query_row(sql, [], |row| row.get::<_, i64>(0)).map(|num| num as u64).map_err(self.failed())
    }

    /// Runs changes as one transaction: after a failure, a full disk or the process's end, all of them are there or none.
    /// `f` also says whether it changed anything.
    pub(super) fn change<T>(&mut self, f: impl FnOnce(&Transaction) -> Result<(T, bool)>) -> Result<T> {
        let path = self.path.clone();
        let failed = |error| failure(&path, &error);
        let transaction = self.db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let (result, has_changed) = f(&transaction)?;
        if has_changed {
            // Columns of searches know by it what they were made of; a number would come again after a restored backup.
            let sql = "UPDATE gallery SET value = lower(hex(randomblob(16))) WHERE name = 'state'";
            transaction.execute(sql, []).map_err(failed)?;
        }
        transaction.commit().map_err(failed)?;
        Ok(result)
    }

    /// Distinguishes what the gallery holds now from what it held before any change.
    pub(super) fn state(&self) -> Result<[u8; 16]> {
        let sql = "SELECT unhex(value) FROM gallery WHERE name = 'state'";
        self.db.query_row(sql, [], |row| row.get(0)).map_err(self.failed())
    }

    /// Runs `f` while nobody can change the gallery, if it still is in this state; says whether it was.
    pub(super) fn if_still(&self, state: [u8; 16], f: impl FnOnce() -> Result<()>) -> Result<bool> {
        self.db.execute_batch("BEGIN IMMEDIATE").map_err(self.failed())?;
        let done = self.state().and_then(|now| if now == state { f().map(|()| true) } else { Ok(false) });
        self.db.execute_batch("ROLLBACK").map_err(self.failed())?;
        done
    }

    /// Writes what removals left free as a smaller file, and removes the columns of searches. Returns the bytes that it
    /// was smaller by, and whether the log of changes is empty: see [`Removed`](super::Removed).
    ///
    /// # Errors
    /// When there is no memory for a second copy, or another process uses the gallery for more than a minute.
    pub fn compact(&mut self) -> Result<(u64, bool)> {
        let before = self.info()?.bytes;
        remove_columns(&self.path)?;
        self.db.execute_batch("VACUUM").map_err(self.failed())?;
        let is_log_empty = self.empty_log()?;
        Ok((before.saturating_sub(self.info()?.bytes), is_log_empty))
    }

    /// Writes the log of changes into the file and empties it; returns whether it could, or a reader was in the way.
    pub(super) fn empty_log(&self) -> Result<bool> {
        let busy = self.db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
        match busy {
            Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => Ok(false),
            busy => Ok(busy.map_err(self.failed())? == 0),
        }
    }

    /// Returns what is wrong with the file, if anything is: pages that are not whole, and faces and names that are not
    /// as they were written.
    ///
    /// # Errors
    /// When the file cannot be read at all.
    pub fn check(&self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let mut pages = self.db.prepare("PRAGMA integrity_check(20)").map_err(self.failed())?;
        let lines = pages.query_map([], |row| row.get::<_, String>(0)).map_err(self.failed())?;
        for line in lines {
            match line {
                Ok(line) if line == "ok" => {}
                Ok(line) => wrong.push(line),
                Err(error) => wrong.push(error.to_string()),
            }
        }
        let mut missing = self.db.prepare("PRAGMA foreign_key_check").map_err(self.failed())?;
        let num_missing = missing.query_map([], |_| Ok(())).map_err(self.failed())?.count();
        if num_missing > 0 {
            wrong.push(format!("{num_missing} faces are of no person"));
        }
        wrong.extend(self.damaged_faces()?);
        for path in Column::paths_beside(&self.path) {
            let Ok(file) = std::fs::File::open(&path) else { continue };
            if let Err(error) = Column::open(&file, &path).and_then(|column| column.check(&path)) {
                wrong.push(format!("{error}: the next search makes it anew if it is removed"));
            }
        }
        Ok(wrong)
    }

    /// An error about this gallery.
    pub(super) fn wrong(&self, what: String) -> Error {
        gallery_error(&self.path, what)
    }

    /// Wraps SQLite's errors, for `map_err`.
    pub(super) fn failed(&self) -> impl Fn(rusqlite::Error) -> Error + '_ {
        |error| failure(&self.path, &error)
    }
}

/// Removes the columns of searches, and unfinished ones that a killed process left.
pub(super) fn remove_columns(gallery: &Path) -> Result<()> {
    Column::paths_beside(gallery).try_for_each(|path| remove_if_there(&path))?;
    column::remove_unfinished(gallery)
}

/// Makes an error of SQLite's, with what to do about it.
pub(super) fn failure(path: &Path, error: &rusqlite::Error) -> Error {
    use rusqlite::ErrorCode::*;
    if error.sqlite_error_code() == Some(NotADatabase) {
        return gallery_error(path, not_a_gallery("another file"));
    }
    let advice = match error.sqlite_error_code() {
        Some(DatabaseBusy | DatabaseLocked) => ": another process has been using it for a minute",
        Some(CannotOpen | ReadOnly) => ": its folder has to be writable, for the log",
        Some(DatabaseCorrupt) => ": `maskinv gallery check` says more; put back a copy of the file",
        Some(DiskFull) => ": what was enrolled before stays",
        _ => "",
    };
    gallery_error(path, format!("{error}{advice}"))
}

/// An error about a gallery.
pub(super) fn gallery_error(path: &Path, what: String) -> Error {
    Error::Gallery { path: path.to_owned(), what }
}

fn not_a_gallery(found: &str) -> String {
    format!("expected a gallery, found {found}; `maskinv enrol` makes one")
}

/// Opens a connection to a file that exists.
fn connect(path: &Path) -> Result<Connection> {
    let failed = |error| failure(path, &error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(failed)?;
    db.busy_timeout(WAIT).map_err(failed)?;
    // What is deleted is overwritten with zeros, nothing is copied to a folder for temporary files, and a commit is on the
    // disk when it returns.
    let pragmas = "PRAGMA temp_store = MEMORY; PRAGMA secure_delete = ON; PRAGMA foreign_keys = ON;
                   PRAGMA synchronous = FULL;";
    db.execute_batch(pragmas).map(|()| db).map_err(failed)
}

/// Reads the version and the model.
fn read(path: &Path, db: &Connection) -> Result<GalleryModel> {
    let failed = |error| failure(path, &error);
    let wrong = |what| gallery_error(path, what);
    let number = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i32>(0)).map_err(failed);
    if number("PRAGMA application_id")? != APPLICATION {
        return Err(wrong(not_a_gallery("another SQLite database")));
    }
    let version = number("PRAGMA user_version")?;
    if version != VERSION {
        let newer = if version > VERSION { ": a newer maskinv made it" } else { "" };
        return Err(wrong(format!("expected a gallery of version {VERSION}, found version {version}{newer}")));
    }
    let sql = "SELECT value FROM gallery WHERE name = 'model'";
    let model: Option<String> = db.query_row(sql, [], |row| row.get(0)).optional().map_err(failed)?;
    let model = model.ok_or_else(|| wrong("expected the gallery's model, found none".to_owned()))?;
    let model: GalleryModel = serde_json::from_str(&model).map_err(|e| wrong(format!("the gallery's model: {e}")))?;
    match model.embedding_size {
        1..=MAX_DIM => Ok(model),
        size => Err(wrong(format!("expected embeddings of 1 to {MAX_DIM} elements, found {size}"))),
    }
}

/// Makes an empty gallery under another name and renames it, so that it is whole from the first moment. That another
/// process was faster is no error.
fn create(path: &Path, model: &GalleryModel) -> Result<()> {
    if !folder_of(path).is_dir() {
        let what = "expected a folder to make the gallery in, found none".to_owned();
        return Err(gallery_error(path, what));
    }
    // Its file is closed: closing it later would end the locks that SQLite holds on it.
    let temporary = private_temporary(path)?.into_temp_path();
    let failed = |error| failure(path, &error);
    let fill = || {
        let db = Connection::open(&temporary)?;
        db.execute_batch(&format!("PRAGMA page_size = {PAGE_BYTES};"))?;
        // Readers go on while somebody writes.
        db.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0))?;
        db.execute_batch(TABLES)?;
        db.execute_batch(&format!("PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"))?;
        let model = serde_json::to_string(model).expect("its parts are written without failing");
        let insert = "INSERT INTO gallery VALUES ('model', ?1), ('state', lower(hex(randomblob(16))))";
        db.execute(insert, params![model])?;
        // The last connection writes the log into the file.
        db.close().map_err(|(_, error)| error)
    };
    fill().map_err(failed)?;
    match temporary.persist_noclobber(path) {
        Err(error) if error.error.kind() != std::io::ErrorKind::AlreadyExists => Err(Error::io(path)(error.error)),
        _ => sync_folder(folder_of(path)),
    }
}
