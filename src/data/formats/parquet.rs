//! Parquet files as on the Hugging Face hub: a column of images and a column of labels.

use std::collections::VecDeque;
use std::io::{BufReader, BufWriter, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use parquet::basic::{Compression, Type};
use parquet::column::reader::ColumnReader;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::SchemaDescriptor;

use super::classes::{Classes, Paths};
use super::export::{Export, Output};
use super::file::RandomFile;
use crate::data::dataset::Dataset;
use crate::error::{Error, Result};

/// Names of columns of encoded images that are not a group with `bytes`.
const IMAGE_COLUMNS: [&str; 6] = ["image", "img", "jpg", "jpeg", "png", "bytes"];
/// Names of columns of labels.
const LABEL_COLUMNS: [&str; 9] =
    ["label", "labels", "identity", "identity_id", "class", "cls", "person", "person_id", "id"];
/// Images per row group when writing, as in the `datasets` package.
const ROWS_OF_GROUP: usize = 100;
/// Most bytes of decoded row groups that are cached.
const MAX_KEPT_BYTES: usize = 256 << 20;
/// Key of the `datasets` package's metadata in a file.
const METADATA_KEY: &str = "huggingface";
/// The `datasets` package's schema.
const SCHEMA: &str = "message schema {
    optional group image { optional binary bytes; optional binary path (utf8); }
    optional int64 label;
}";

/// The faces of parquet files as a [`Dataset`], in the order of the files and their rows.
///
/// Images are read by row group, and the groups read last are cached, up to 256 MiB. Read in order, each group is
/// decoded once; read at random, a whole group is decoded for one image, so a training set is better converted once, or
/// cached. Every image has [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS).
pub struct ParquetFaces {
    files: Vec<SerializedFileReader<Shared>>,
    paths_of_files: Vec<PathBuf>,
    groups: Vec<Group>,
    classes: Classes,
    paths: Option<Paths>,
    kept: Mutex<Kept>,
}

/// A row group and its column of images.
struct Group {
    file: usize,
    number: usize,
    column: usize,
    first_row: usize,
}

/// The images of the row groups read last, the newest last.
#[derive(Default)]
struct Kept {
    groups: VecDeque<(usize, Arc<Images>)>,
    num_bytes: usize,
}

type Images = Vec<Option<ByteArray>>;

impl ParquetFaces {
    /// Opens parquet files with a column of encoded images (a group with `bytes`, as in the `datasets` package, or a
    /// plain column) and a column of labels (whole numbers or names). Numeric labels are named after the images'
    /// folders where possible, otherwise by the `datasets` package's metadata.
    ///
    /// # Errors
    /// When a file cannot be read, is not a parquet file, or lacks one of the columns or a label.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut set = Self {
            files: Vec::new(),
            paths_of_files: paths.to_vec(),
            groups: Vec::new(),
            classes: Classes::default(),
            paths: None,
            kept: Mutex::default(),
        };
        let (mut labels, mut names, mut image_paths) = (Labels::default(), None, Some(Paths::default()));
        let mut num_rows = 0;
        for (number, path) in paths.iter().enumerate() {
            let file = Shared(Arc::new(RandomFile::open(path)?));
            let reader = guarded(path, || SerializedFileReader::new(file))?;
            let schema = reader.metadata().file_metadata().schema_descr();
            let columns = Columns::find(schema).map_err(|what| Error::Data { path: path.clone(), what })?;
            names = names.or_else(|| class_names(&reader, &columns.label_name));
            for group in 0..reader.num_row_groups() {
                let num = labels.read(&reader, group, columns.label, path)?;
                match (&mut image_paths, columns.path) {
                    (Some(paths), Some(column)) => read_paths(&reader, group, column, num, paths, path)?,
                    _ => image_paths = None,
                }
                set.groups.push(Group { file: number, number: group, column: columns.image, first_row: num_rows });
                num_rows += num;
            }
            set.files.push(reader);
        }
        let path = paths.first().map_or(Path::new(""), PathBuf::as_path);
        let classes = match labels {
            Labels { numbers, texts } if texts.is_empty() => Classes::from_numbers(&numbers, path)?,
            Labels { numbers, texts } if numbers.is_empty() => Classes::from_texts(texts, path)?,
            _ => {
                let what = "expected labels of one kind, found numbers and names".to_owned();
                return Err(Error::Data { path: path.to_owned(), what });
            }
        };
        set.paths = image_paths.filter(|paths| paths.len() == num_rows);
        let classes = match &set.paths {
            Some(paths) => classes.with_folders(paths),
            None => classes,
        };
        set.classes = classes.with_names(&names.unwrap_or_default());
        Ok(set)
    }

    fn image(&self, index: usize) -> Result<ByteArray> {
        let at = self.groups.partition_point(|group| group.first_row <= index) - 1;
        let images = self.images_of(at)?;
        let image = images.get(index - self.groups[at].first_row).cloned().flatten();
        image
            .ok_or_else(|| Error::Image { path: self.name(index).into(), what: "expected an image, found none".into() })
    }

    fn images_of(&self, at: usize) -> Result<Arc<Images>> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, images)) = kept().groups.iter().find(|(group, _)| *group == at) {
            return Ok(images.clone());
        }
        let group = &self.groups[at];
        let path = &self.paths_of_files[group.file];
        let images = Arc::new(read_column(&self.files[group.file], group.number, group.column, path)?);
        let bytes_of = |images: &Images| images.iter().flatten().map(ByteArray::len).sum::<usize>();
        let mut kept = kept();
        kept.num_bytes += bytes_of(&images);
        kept.groups.push_back((at, images.clone()));
        while kept.num_bytes > MAX_KEPT_BYTES
            && kept.groups.len() > 1
            && let Some((_, oldest)) = kept.groups.pop_front()
        {
            kept.num_bytes -= bytes_of(&oldest);
        }
        Ok(images)
    }
}

impl Dataset for ParquetFaces {
    fn len(&self) -> usize {
        self.classes.num_images()
    }

    fn num_identities(&self) -> usize {
        self.classes.num_identities()
    }

    fn label(&self, index: usize) -> u32 {
        self.classes.label(index)
    }

    fn name(&self, index: usize) -> String {
        let at = self.groups.partition_point(|group| group.first_row <= index).saturating_sub(1);
        let file = self.paths_of_files[self.groups[at].file].display();
        match &self.paths {
            Some(paths) => format!("{file}, {}", paths.get(index)),
            None => format!("{file}, image {index} of the set"),
        }
    }

    fn identity_name(&self, label: u32) -> String {
        self.classes.name(label)
    }

    fn file_name(&self, index: usize) -> Option<String> {
        self.paths.as_ref().map(|paths| paths.file_name(index).to_owned())
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        Ok(Some(self.image(index)?.data().to_vec()))
    }
}

/// Numbers of a file's columns.
struct Columns {
    image: usize,
    path: Option<usize>,
    label: usize,
    label_name: String,
}

impl Columns {
    fn find(schema: &SchemaDescriptor) -> std::result::Result<Self, String> {
        let (mut image, mut label) = (None, None);
        for (number, column) in schema.columns().iter().enumerate().filter(|(_, c)| c.max_rep_level() == 0) {
            let parts: Vec<&str> = column.path().parts().iter().map(String::as_str).collect();
            match (parts.as_slice(), column.physical_type()) {
                ([_, "bytes"], Type::BYTE_ARRAY) => image = image.or(Some(number)),
                ([name], Type::BYTE_ARRAY) if IMAGE_COLUMNS.contains(name) => image = image.or(Some(number)),
                ([name], Type::BYTE_ARRAY | Type::INT32 | Type::INT64) if LABEL_COLUMNS.contains(name) => {
                    label = label.or(Some((number, (*name).to_owned())));
                }
                _ => {}
            }
        }
        let all: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
        let (Some(image), Some((label, label_name))) = (image, label) else {
            return Err(format!(
                "expected columns of images ({IMAGE_COLUMNS:?}) and labels ({LABEL_COLUMNS:?}), found {all:?}"
            ));
        };
        let beside = all[image].strip_suffix(".bytes").map(|group| format!("{group}.path"));
        let path = beside.and_then(|beside| all.iter().position(|name| *name == beside));
        let is_text = |column: &usize| schema.column(*column).physical_type() == Type::BYTE_ARRAY;
        Ok(Self { image, path: path.filter(is_text), label, label_name })
    }
}

#[derive(Default)]
struct Labels {
    numbers: Vec<i64>,
    texts: Vec<String>,
}

impl Labels {
    /// Reads a row group's labels and returns its number of rows.
    fn read(
        &mut self,
        reader: &SerializedFileReader<Shared>,
        group: usize,
        column: usize,
        path: &Path,
    ) -> Result<usize> {
        let error = |what: String| Error::Data { path: path.to_owned(), what };
        let schema = reader.metadata().file_metadata().schema_descr();
        if schema.column(column).physical_type() == Type::BYTE_ARRAY {
            let rows = read_column(reader, group, column, path)?;
            let num = rows.len();
            for row in rows {
                let text = row.ok_or_else(|| error("expected a label in every row, found none".to_owned()))?;
                self.texts.push(String::from_utf8_lossy(text.data()).into_owned());
            }
            return Ok(num);
        }
        let rows = guarded(path, || {
            let num_rows = reader.metadata().row_group(group).num_rows() as usize;
            let mut values = Vec::new();
            match reader.get_row_group(group)?.get_column_reader(column)? {
                ColumnReader::Int64ColumnReader(mut column) => {
                    column.read_records(num_rows, Some(&mut Vec::new()), None, &mut values)?;
                }
                ColumnReader::Int32ColumnReader(mut column) => {
                    let mut narrow = Vec::new();
                    column.read_records(num_rows, Some(&mut Vec::new()), None, &mut narrow)?;
                    values.extend(narrow.into_iter().map(i64::from));
                }
                _ => {}
            }
            Ok((num_rows, values))
        });
        let (num_rows, values) = rows?;
        if values.len() != num_rows {
            return Err(error(format!("expected {num_rows} labels in row group {group}, found {}", values.len())));
        }
        for value in values {
            if value < 0 {
                return Err(error(format!("expected labels from 0, found {value}")));
            }
            self.numbers.push(value);
        }
        Ok(num_rows)
    }
}

/// Reads a column of bytes; `None` where a row has no value.
fn read_column(reader: &SerializedFileReader<Shared>, group: usize, column: usize, path: &Path) -> Result<Images> {
    guarded(path, || {
        let row_group = reader.get_row_group(group)?;
        let num_rows = row_group.metadata().num_rows() as usize;
        let max_level = row_group.metadata().column(column).column_descr().max_def_level();
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        if let ColumnReader::ByteArrayColumnReader(mut column) = row_group.get_column_reader(column)? {
            column.read_records(num_rows, Some(&mut levels), None, &mut values)?;
        }
        if max_level == 0 {
            return Ok(values.into_iter().map(Some).collect());
        }
        let mut values = values.into_iter();
        Ok(levels.into_iter().map(|level| if level == max_level { values.next() } else { None }).collect())
    })
}

fn read_paths(
    reader: &SerializedFileReader<Shared>,
    group: usize,
    column: usize,
    num_rows: usize,
    paths: &mut Paths,
    file: &Path,
) -> Result<()> {
    let rows = read_column(reader, group, column, file)?;
    // If one path is missing, the data set has no file names.
    if rows.len() == num_rows && rows.iter().all(Option::is_some) {
        rows.iter().flatten().for_each(|row| paths.push(&String::from_utf8_lossy(row.data())));
    }
    Ok(())
}

/// Names of the labels in the `datasets` package's metadata.
fn class_names(reader: &SerializedFileReader<Shared>, label: &str) -> Option<Vec<String>> {
    let entries = reader.metadata().file_metadata().key_value_metadata()?;
    let text = entries.iter().find(|entry| entry.key == METADATA_KEY)?.value.as_ref()?;
    let json: serde_json::Value = serde_json::from_str(text).ok()?;
    let names = json.pointer("/info/features")?.get(label)?.get("names")?.as_array()?;
    names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}

/// Calls the library and names the file in its errors; a panic, which some broken files cause, becomes an error.
fn guarded<T>(path: &Path, call: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    let wrong = |what: String| Error::Data { path: path.to_owned(), what: format!("parquet: {what}") };
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| wrong(e.to_string())),
        Err(_) => Err(wrong("the file is broken".to_owned())),
    }
}

/// A file that several row groups are read from at once.
#[derive(Clone)]
struct Shared(Arc<RandomFile>);

impl Length for Shared {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Shared {
    type T = BufReader<From>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(BufReader::new(From { file: self.0.clone(), at: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<bytes::Bytes> {
        let bytes = self.0.read(start, length);
        bytes.map(bytes::Bytes::from).map_err(|e| parquet::errors::ParquetError::General(e.to_string()))
    }
}

/// A file read in order from an offset.
struct From {
    file: Arc<RandomFile>,
    at: u64,
}

impl Read for From {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let bytes = self.file.read_up_to(self.at, buffer.len()).map_err(std::io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}

/// Writes a parquet file that the `datasets` package and the hub's viewer show as images with named labels.
///
/// # Errors
/// When an image cannot be read, or the file exists or cannot be written; no file is left then.
pub fn write_parquet(export: &mut Export, path: &Path) -> Result<()> {
    let failed =
        |e: parquet::errors::ParquetError| Error::Data { path: path.to_owned(), what: format!("parquet: {e}") };
    let file = Output::new(path)?;
    let features = serde_json::json!({"info": {"features": {
        "image": {"_type": "Image"},
        "label": {"names": export.identity_names(), "_type": "ClassLabel"},
    }}});
    let properties = WriterProperties::builder()
        // Images are compressed already.
        .set_compression(Compression::UNCOMPRESSED)
        .set_dictionary_enabled(false)
        .set_key_value_metadata(Some(vec![KeyValue::new(METADATA_KEY.to_owned(), features.to_string())]))
        .build();
    let schema = Arc::new(parse_message_type(SCHEMA).map_err(failed)?);
    let mut out = BufWriter::new(file.as_file());
    let mut writer = SerializedFileWriter::new(&mut out, schema, Arc::new(properties)).map_err(failed)?;
    let mut rows = Rows::default();
    export.for_each(&mut |image| {
        rows.paths.push(image.path().into_bytes().into());
        rows.images.push(image.bytes.into());
        rows.labels.push(i64::from(image.label));
        if rows.labels.len() == ROWS_OF_GROUP {
            std::mem::take(&mut rows).write(&mut writer).map_err(failed)?;
        }
        Ok(())
    })?;
    if !rows.labels.is_empty() {
        rows.write(&mut writer).map_err(failed)?;
    }
    writer.close().map_err(failed)?;
    out.flush().map_err(Error::io(path))?;
    drop(out);
    file.finish()
}

#[derive(Default)]
struct Rows {
    images: Vec<ByteArray>,
    paths: Vec<ByteArray>,
    labels: Vec<i64>,
}

impl Rows {
    fn write<W: Write + Send>(self, writer: &mut SerializedFileWriter<W>) -> parquet::errors::Result<()> {
        let mut group = writer.next_row_group()?;
        for values in [&self.images, &self.paths] {
            // Definition level 2: the group and its value are both present.
            let levels = vec![2; values.len()];
            let mut column = group.next_column()?.expect("the schema has three columns");
            column.typed::<ByteArrayType>().write_batch(values, Some(&levels), None)?;
            column.close()?;
        }
        let mut column = group.next_column()?.expect("the schema has three columns");
        column.typed::<Int64Type>().write_batch(&self.labels, Some(&vec![1; self.labels.len()]), None)?;
        column.close()?;
        group.close()?;
        Ok(())
    }
}
