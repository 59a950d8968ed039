//! TensorBoard event files: scalars over the steps of a training.
//!
//! A file is a sequence of records (TensorFlow's TFRecord), each of which is an `Event` message. Field numbers are
//! those of `event.proto` and `summary.proto` (tensorflow/tensorboard 2.21.0).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::protobuf::Writer;

/// Prefix of the name of every event file.
const PREFIX: &str = "events.out.tfevents.";
/// File version, in the first event of a file.
const VERSION: &[u8] = b"brain.Event:2";
/// Value of `SessionLog.SessionStatus.START`.
const START: i64 = 1;

/// Growing event file that TensorBoard can read meanwhile. Dropping it flushes what is left and ignores errors.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    out: BufWriter<File>,
}

impl EventFile {
    /// Creates a new file in `folder`, which is created if missing; existing files are left as they are.
    ///
    /// - `wall_time`: now, seconds since 1970
    /// - `first_step`: the step at which a resumed training resumes; `None` for a new training. TensorBoard discards
    ///   what older files of the folder have for this and later steps, or everything for a new training.
    ///
    /// # Errors
    /// When the folder cannot be read or written to.
    pub(crate) fn create(folder: &Path, wall_time: f64, first_step: Option<u64>) -> Result<Self> {
        let (path, file) = new_file(folder, wall_time)?;
        let mut file = Self { path, out: BufWriter::new(file) };
        file.write(event(wall_time, 0).bytes(3, VERSION))?;
        // The first file needs a start event too: TensorBoard's loader in Python (`_CheckForRestartAndMaybePurge`)
        // takes the first one of a folder for the beginning and discards nothing there.
        file.write(event(wall_time, first_step.unwrap_or(0)).message(7, Writer::default().int(1, START)))?;
        // Flush, so that the next file's start event is not the first one, even if this process is killed.
        file.flush()?;
        Ok(file)
    }

    /// Appends the values of a step as one event, each with its tag, such as `train/loss`. TensorBoard shows NaN and
    /// infinite values as such.
    ///
    /// # Errors
    /// When the file cannot be written to.
    pub(crate) fn scalars(&mut self, step: u64, wall_time: f64, values: &[(&str, f32)]) -> Result<()> {
        let summary = values.iter().fold(Writer::default(), |summary, (tag, value)| {
            summary.message(1, Writer::default().bytes(1, tag.as_bytes()).float(2, *value))
        });
        self.write(event(wall_time, step).message(5, summary))
    }

    /// Writes appended events to the file, so that TensorBoard sees them.
    ///
    /// # Errors
    /// When the file cannot be written to.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(Error::io(&self.path))
    }

    fn write(&mut self, event: Writer) -> Result<()> {
        self.out.write_all(&record(&event.finish())).map_err(Error::io(&self.path))
    }
}

/// Creates a file with an unused name that sorts behind those of all other event files of the folder.
fn new_file(folder: &Path, wall_time: f64) -> Result<(PathBuf, File)> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let stem = |seconds: u64| format!("{PREFIX}{seconds:010}.maskinv.{}.", std::process::id());
    let mut name = stem(wall_time as u64);
    // TensorBoard reads the files of a folder in the order of their names, not of their age. The clock may have gone
    // back, and another process may have started in the same second.
    if let Some((seconds, last)) = last_file(folder)?
        && last > name
        && !last.starts_with(&name)
    {
        name = stem(seconds + 1);
    }
    let mut n = 0;
    loop {
        let path = folder.join(format!("{name}{n}"));
        match File::create_new(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => n += 1,
            Err(e) => return Err(Error::io(&path)(e)),
        }
    }
}

/// Returns the seconds in its name, and the name, of the event file that TensorBoard reads last.
fn last_file(folder: &Path) -> Result<Option<(u64, String)>> {
    let mut last = None;
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let name = entry.map_err(Error::io(folder))?.file_name().to_string_lossy().into_owned();
        // All programs write ten digits.
        let seconds = name.strip_prefix(PREFIX).and_then(|rest| rest.get(..10)?.parse().ok());
        last = last.max(seconds.map(|seconds| (seconds, name)));
    }
    Ok(last)
}

/// Starts an `Event`. Protocol buffers omit a step of 0.
fn event(wall_time: f64, step: u64) -> Writer {
    let event = Writer::default().double(1, wall_time);
    if step == 0 { event } else { event.int(2, step as i64) }
}

/// Returns a record: length, checksum of the length, data, checksum of the data.
fn record(data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u64).to_le_bytes();
    [&len, &masked_crc(&len).to_le_bytes()[..], data, &masked_crc(data).to_le_bytes()].concat()
}

static CRC_32C: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

/// Masked CRC-32C. The mask avoids the degenerate CRC of bytes that contain their own CRC.
fn masked_crc(bytes: &[u8]) -> u32 {
    CRC_32C.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protobuf::{Reader, Value};

    /// Contents of an event.
    #[derive(Debug, Default, PartialEq)]
    struct Read {
        wall_time: f64,
        step: u64,
        version: String,
        status: u64,
        values: Vec<(String, f32)>,
    }

    fn fields(bytes: &[u8]) -> Vec<(u32, Value<'_>)> {
        let mut reader = Reader::new(bytes, 0);
        std::iter::from_fn(|| reader.next().unwrap()).map(|field| (field.number, field.value)).collect()
    }

    fn read_event(bytes: &[u8]) -> Read {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let mut read = Read::default();
        for field in fields(bytes) {
            match field {
                (1, Value::Fixed64(wall_time)) => read.wall_time = f64::from_le_bytes(wall_time),
                (2, Value::Varint(step)) => read.step = step,
                (3, Value::Bytes { bytes, .. }) => read.version = text(bytes),
                (5, Value::Bytes { bytes, .. }) => {
                    for value in fields(bytes) {
                        let (1, Value::Bytes { bytes, .. }) = value else { panic!("{value:?}") };
                        match fields(bytes)[..] {
                            [(1, Value::Bytes { bytes, .. }), (2, Value::Fixed32(value))] => {
                                read.values.push((text(bytes), f32::from_le_bytes(value)));
                            }
                            ref other => panic!("{other:?}"),
                        }
                    }
                }
                (7, Value::Bytes { bytes, .. }) => match fields(bytes)[..] {
                    [(1, Value::Varint(status))] => read.status = status,
                    ref other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            }
        }
        read
    }

    fn read_file(path: &Path) -> Vec<Read> {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let len = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc(&rest[..8]).to_le_bytes());
            assert_eq!(rest[12 + len..][..4], masked_crc(&rest[12..12 + len]).to_le_bytes());
            events.push(read_event(&rest[12..12 + len]));
            rest = &rest[12 + len + 4..];
        }
        events
    }

    fn name(file: &EventFile) -> &str {
        file.path.file_name().unwrap().to_str().unwrap()
    }

    /// The CRCs of RFC 3720 (B.4), masked by TensorBoard 2.21.0 (`pywrap_tensorflow.masked_crc32c`).
    #[test]
    fn checksums_are_tensorboards() {
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(masked_crc(b""), 0xa282_ead8);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
        assert_eq!(masked_crc(&[0; 32]), 0x0fd7_fffa);
        assert_eq!(masked_crc(&[0xff; 32]), 0xf909_b029);
        assert_eq!(masked_crc(&ascending), 0x951f_7892);
    }

    /// The expected file is from tests/fixtures/tensorboard.py (tensorboard 2.21.0).
    #[test]
    fn bytes_are_tensorboards() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path(), 1_700_000_000.25, Some(7)).unwrap();
        let long = format!("train/{}", "x".repeat(200));
        let mut scalars = |step, wall_time, values: &[_]| file.scalars(step, wall_time, values).unwrap();
        scalars(7, 1_700_000_001.5, &[("train/loss", 21.4382), ("train/lr", 0.1)]);
        let unusual = [("train/loss", f32::NAN), ("train/grad_norm", f32::INFINITY), ("train/lr", 0.0)];
        scalars(300, 1_700_000_002.0, &unusual);
        scalars(1 << 40, 1_700_000_003.125, &[(&long, -1e-42), ("train/größe", f32::NEG_INFINITY)]);
        scalars(0, 1_700_000_004.0, &[("train/loss", f32::MAX)]);
        file.flush().unwrap();
        let expected = include_bytes!("../tests/fixtures/tensorboard.tfevents");
        assert!(std::fs::read(&file.path).unwrap() == expected);
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path(), 5.5, None).unwrap();
        let path = file.path.clone();
        let version = Read { wall_time: 5.5, version: "brain.Event:2".into(), ..Read::default() };
        let start = Read { wall_time: 5.5, status: 1, ..Read::default() };
        assert_eq!(read_file(&path), [version, start], "before anything is flushed");
        file.scalars(0, 6.0, &[("a", 1.5)]).unwrap();
        file.scalars(12, 7.0, &[("a", -0.0), ("b/c", 3e38)]).unwrap();
        drop(file);
        let events = read_file(&path);
        assert_eq!(events[2], Read { wall_time: 6.0, values: vec![("a".into(), 1.5)], ..Read::default() });
        let values = vec![("a".into(), -0.0), ("b/c".into(), 3e38)];
        assert_eq!(events[3..], [Read { wall_time: 7.0, step: 12, values, ..Read::default() }]);

        let resumed = EventFile::create(folder.path(), 8.0, Some(9)).unwrap();
        let start = Read { wall_time: 8.0, step: 9, status: 1, ..Read::default() };
        assert_eq!(read_file(&resumed.path)[1..], [start]);
    }

    #[test]
    fn a_new_file_has_the_last_name_and_no_file_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("made/on the way");
        let create = |wall_time| name(&EventFile::create(&folder, wall_time, None).unwrap()).to_owned();
        let id = std::process::id();
        assert_eq!(create(1700.9), format!("events.out.tfevents.0000001700.maskinv.{id}.0"));
        assert_eq!(create(1700.9), format!("events.out.tfevents.0000001700.maskinv.{id}.1"));
        assert_eq!(create(1600.0), format!("events.out.tfevents.0000001701.maskinv.{id}.0"), "the clock went back");
        assert_eq!(create(1800.0), format!("events.out.tfevents.0000001800.maskinv.{id}.0"));
        for other in ["events.out.tfevents.0000001900.zebra.1.0", "events.out.tfevents.profile-empty", "notes.txt"] {
            std::fs::write(folder.join(other), b"").unwrap();
        }
        assert_eq!(create(1900.0), format!("events.out.tfevents.0000001901.maskinv.{id}.0"), "another program's");
        assert_eq!(create(1950.0), format!("events.out.tfevents.0000001950.maskinv.{id}.0"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        std::fs::write(&path, b"").unwrap();
        let error = EventFile::create(&path, 0.0, None).unwrap_err();
        assert!(matches!(&error, Error::Io { path: at, .. } if *at == path), "{error}");
    }
}
