//! A gallery as a parquet file, for vector databases and data frames.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, DataType, FloatType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

use super::{Gallery, StoredFace};
use crate::error::{Error, Result};
use crate::files::{persist, private_temporary};

/// The file's columns.
const SCHEMA: &str = "
    message gallery {
        required int64 id;
        required binary person (UTF8);
        required binary source (UTF8);
        required int64 enrolled;
        optional float score;
        optional float side;
        required float sharpness;
        optional float mask;
        required group embedding (LIST) { repeated group list { required float element; } }
    }";
/// Faces of a row group.
const ROWS_OF_GROUP: usize = 10_000;

/// Writes all faces with their embeddings, in the order of their numbers; returns their number.
///
/// # Errors
/// When the gallery cannot be read, a face is damaged, or the file cannot be written; no file is left then.
pub fn export_parquet(gallery: &Gallery, path: &Path) -> Result<usize> {
    let failed =
        |e: parquet::errors::ParquetError| Error::Data { path: path.to_owned(), what: format!("parquet: {e}") };
    let file = private_temporary(path)?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        // No two embeddings are alike.
        .set_column_dictionary_enabled("embedding.list.element".into(), false);
    let schema = Arc::new(parse_message_type(SCHEMA).map_err(failed)?);
    let mut out = BufWriter::new(file.as_file());
    let mut writer = SerializedFileWriter::new(&mut out, schema, Arc::new(properties.build())).map_err(failed)?;
    let (mut rows, mut num) = (Rows::default(), 0);
    gallery.for_each_face(|face, embedding| {
        num += 1;
        rows.faces.push(face);
        rows.embeddings.extend(embedding);
        if rows.faces.len() == ROWS_OF_GROUP {
            std::mem::take(&mut rows).write(&mut writer).map_err(failed)?;
        }
        Ok(())
    })?;
    if !rows.faces.is_empty() {
        rows.write(&mut writer).map_err(failed)?;
    }
    writer.close().map_err(failed)?;
    out.flush().map_err(Error::io(path))?;
    drop(out);
    persist(file, path)?;
    Ok(num)
}

#[derive(Default)]
struct Rows {
    faces: Vec<StoredFace>,
    embeddings: Vec<f32>,
}

impl Rows {
    fn write<W: Write + Send>(self, writer: &mut SerializedFileWriter<W>) -> parquet::errors::Result<()> {
        let Self { faces, embeddings } = self;
        let mut of_rows = writer.next_row_group()?;
        let group = &mut of_rows;
        let text =
            |of: fn(&StoredFace) -> &str| -> Vec<ByteArray> { faces.iter().map(|face| of(face).into()).collect() };
        let long = |of: fn(&StoredFace) -> i64| -> Vec<i64> { faces.iter().map(of).collect() };
        column::<Int64Type, W>(group, &long(|face| face.id), None, None)?;
        column::<ByteArrayType, W>(group, &text(|face| &face.person), None, None)?;
        column::<ByteArrayType, W>(group, &text(|face| &face.source), None, None)?;
        column::<Int64Type, W>(group, &long(|face| face.enrolled), None, None)?;
        let mut optional = |of: fn(&StoredFace) -> Option<f32>, is_always: bool| {
            let values: Vec<f32> = faces.iter().filter_map(of).collect();
            let levels: Vec<i16> = faces.iter().map(|face| of(face).is_some().into()).collect();
            column::<FloatType, W>(group, &values, (!is_always).then_some(&levels[..]), None)
        };
        optional(|face| face.score, false)?;
        optional(|face| face.side, false)?;
        optional(|face| Some(face.sharpness), true)?;
        optional(|face| face.mask, false)?;
        // A list's first element begins a row.
        let dim = embeddings.len() / faces.len();
        let begins: Vec<i16> = (0..embeddings.len()).map(|i| i16::from(i % dim != 0)).collect();
        column::<FloatType, W>(group, &embeddings, Some(&vec![1; embeddings.len()]), Some(&begins))?;
        of_rows.close().map(drop)
    }
}

/// Writes the next column of a row group.
fn column<T: DataType, W: Write + Send>(
    group: &mut SerializedRowGroupWriter<W>,
    values: &[T::T],
    definition: Option<&[i16]>,
    repetition: Option<&[i16]>,
) -> parquet::errors::Result<()> {
    let mut column = group.next_column()?.expect("the schema has as many columns");
    column.typed::<T>().write_batch(values, definition, repetition)?;
    column.close()
}
