//! The gallery's file: its creation, version and model, and what keeps it whole.

use std::fs::OpenOptions;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};
use serde::{Deserialize, Serialize};

use super::column::{Column, ColumnKind};
use crate::error::{Error, Result};
use crate::files::{folder_of, remove_if_there};
use crate::models::ComputedWith;

/// SQLite's field for what a file is: `msgl`.
const APPLICATION: i32 = 0x6d73_676c;
/// Version of the tables.
const VERSION: i32 = 1;
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
    /// Distinguishes this gallery from others that were at the same path.
    id: String,
}

impl Gallery {
    /// Opens a gallery.
    ///
    /// # Errors
    /// When there is none, the file is none, or was written by a newer version.
    pub fn open(path: &Path) -> Result<Self> {
        check_is_gallery(path)?;
        let db = connect(path)?;
        let (model, id) = read(path, &db)?;
        Ok(Self { path: path.to_owned(), db, model, id })
    }

    /// Opens a gallery of the network `model`, or makes it if there is no file. Only its owner may read it.
    ///
    /// # Errors
    /// As [`Self::open`], when it cannot be made, or when its embeddings are those of another network.
    pub fn open_or_create(path: &Path, model: &GalleryModel) -> Result<Self> {
        if !std::fs::metadata(path).is_ok_and(|data| data.len() > 0) {
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

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Returns what the gallery holds.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn info(&self) -> Result<GalleryInfo> {
        let number = |sql: &str| self.db.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(self.failed());
        let num_masked = match number("SELECT count(mask) FROM faces")? {
            0 => None,
            _ => Some(number("SELECT count(*) FROM faces WHERE mask > 0.5")? as usize),
        };
        let page = number("PRAGMA page_size")? as u64;
        Ok(GalleryInfo {
            model: self.model.clone(),
            num_people: number("SELECT count(*) FROM people")? as usize,
            num_faces: number("SELECT count(*) FROM faces")? as usize,
            num_masked,
            bytes: number("PRAGMA page_count")? as u64 * page,
            free_bytes: number("PRAGMA freelist_count")? as u64 * page,
            version: VERSION,
        })
    }

    /// Runs changes as one transaction: after a failure, a full disk or the process's end, all of them are there or none.
    pub(super) fn change<T>(&mut self, f: impl FnOnce(&Transaction) -> rusqlite::Result<T>) -> Result<T> {
        let path = self.path.clone();
        let run = || {
            let transaction = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let result = f(&transaction)?;
            transaction.execute("UPDATE gallery SET value = value + 1 WHERE name = 'changes'", [])?;
            transaction.commit()?;
            Ok(result)
        };
        run().map_err(|error| failure(&path, &error))
    }

    /// Number of changes since the gallery was made.
    pub(super) fn changes(&self) -> Result<u64> {
        let sql = "SELECT CAST(value AS INTEGER) FROM gallery WHERE name = 'changes'";
        self.db.query_row(sql, [], |row| row.get::<_, i64>(0)).map(|n| n as u64).map_err(self.failed())
    }

    /// Writes what removals left free as a smaller file, and removes the columns of searches. After this no removed
    /// embedding is left in the gallery's files. Returns the bytes that it was smaller by.
    ///
    /// # Errors
    /// When the disk has no room for a second copy, or another process uses the gallery.
    pub fn compact(&mut self) -> Result<u64> {
        let before = self.info()?.bytes;
        self.db.execute_batch("VACUUM").map_err(self.failed())?;
        self.forget_removed()?;
        Ok(before.saturating_sub(self.info()?.bytes))
    }

    /// Empties the log of changes and removes the columns, which may hold removed embeddings.
    pub(super) fn forget_removed(&self) -> Result<()> {
        for kind in ColumnKind::ALL {
            for is_pooled in [false, true] {
                remove_if_there(&Column::path_beside(&self.path, kind, is_pooled))?;
            }
        }
        let busy = self.db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
        match busy.map_err(self.failed())? {
            0 => Ok(()),
            _ => Err(self.wrong(
                "another process reads the gallery: its log keeps the removed faces until `maskinv \
                                 gallery compact` runs alone"
                    .to_owned(),
            )),
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
        Ok(wrong)
    }

    /// An error about this gallery.
    pub(super) fn wrong(&self, what: String) -> Error {
        Error::Gallery { path: self.path.clone(), what }
    }

    /// Wraps SQLite's errors, for `map_err`.
    pub(super) fn failed(&self) -> impl Fn(rusqlite::Error) -> Error + '_ {
        |error| failure(&self.path, &error)
    }
}

/// Makes an error of SQLite's, with what to do about it.
fn failure(path: &Path, error: &rusqlite::Error) -> Error {
    use rusqlite::ErrorCode::*;
    let advice = match error.sqlite_error_code() {
        Some(DatabaseBusy | DatabaseLocked) => ": another process has been writing to it for a minute",
        Some(DatabaseCorrupt) => ": `maskinv gallery check` says more; put back a copy of the file",
        Some(DiskFull) => ": what was enrolled before stays",
        _ => "",
    };
    Error::Gallery { path: path.to_owned(), what: format!("{error}{advice}") }
}

/// Checks the first bytes, so that SQLite never writes to a file that is something else.
fn check_is_gallery(path: &Path) -> Result<()> {
    let wrong = |found: &str| {
        let what = format!("expected a gallery, found {found}; `maskinv enrol` makes one");
        Err(Error::Gallery { path: path.to_owned(), what })
    };
    let mut head = [0; 72];
    match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return wrong("no such file"),
        Err(error) => return Err(Error::io(path)(error)),
        Ok(_) if path.is_dir() => return wrong("a folder"),
        Ok(mut file) => match file.read_exact(&mut head) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return wrong("a shorter file"),
            read => read.map_err(Error::io(path))?,
        },
    }
    let application = i32::from_be_bytes([head[68], head[69], head[70], head[71]]);
    match (head.starts_with(b"SQLite format 3\0"), application) {
        (true, APPLICATION) => Ok(()),
        (true, _) => wrong("another SQLite database"),
        _ => wrong("another file"),
    }
}

/// Opens a connection to a file that exists.
fn connect(path: &Path) -> Result<Connection> {
    let failed = |error| failure(path, &error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(failed)?;
    db.busy_timeout(WAIT).map_err(failed)?;
    // What is deleted is overwritten with zeros; a commit is on the disk when it returns.
    let pragmas = "PRAGMA secure_delete = ON; PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL;";
    db.execute_batch(pragmas).map_err(failed)?;
    Ok(db)
}

/// Reads the version, the model and the identifier.
fn read(path: &Path, db: &Connection) -> Result<(GalleryModel, String)> {
    let failed = |error| failure(path, &error);
    let version: i32 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    let wrong = |what: String| Error::Gallery { path: path.to_owned(), what };
    if version != VERSION {
        let newer = if version > VERSION { ": a newer maskinv made it" } else { "" };
        return Err(wrong(format!("expected a gallery of version {VERSION}, found version {version}{newer}")));
    }
    let value = |name: &str| {
        let sql = "SELECT value FROM gallery WHERE name = ?1";
        let value: Option<String> = db.query_row(sql, [name], |row| row.get(0)).optional().map_err(failed)?;
        value.ok_or_else(|| wrong(format!("expected the gallery's {name}, found none")))
    };
    let model = serde_json::from_str(&value("model")?).map_err(|e| wrong(format!("the gallery's model: {e}")))?;
    Ok((model, value("id")?))
}

/// Makes an empty gallery. Another process may be making it at the same time.
fn create(path: &Path, model: &GalleryModel) -> Result<()> {
    if path.is_dir() || !folder_of(path).is_dir() {
        let what = "expected a path for a new gallery, found a folder or none to write it to".to_owned();
        return Err(Error::Gallery { path: path.to_owned(), what });
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    drop(options.open(path).map_err(Error::io(path))?);
    let failed = |error| failure(path, &error);
    let mut db = connect(path)?;
    // Readers go on while somebody writes.
    db.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0)).map_err(failed)?;
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
    let version: i32 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    if version != 0 {
        return Ok(());
    }
    let fill = || {
        transaction.execute_batch(TABLES)?;
        transaction
            .execute_batch(&format!("PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"))?;
        let model = serde_json::to_string(model).expect("its parts are written without failing");
        let insert = "INSERT INTO gallery VALUES ('model', ?1), ('id', lower(hex(randomblob(16)))), ('changes', '0')";
        transaction.execute(insert, params![model])?;
        transaction.commit()
    };
    fill().map_err(failed)?;
    // The first bytes have to be in the file itself, where the next process looks for them.
    db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).map_err(failed)
}
