//! Writes any data set as a `.rec` file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::record::{Header, write_record};
use crate::data::formats::export::{Export, Output};
use crate::error::{Error, Result};
use crate::files::{NewFolders, folder_of};

/// Labels and keys are f32 in the format, which is exact for whole numbers up to here.
const MAX_EXACT: usize = 1 << 24;

/// Checks that the folder of a new `NAME.rec` holds no other set.
///
/// # Errors
/// When it does: the format has one file `property` in a folder.
pub fn check_records(path: &Path) -> Result<()> {
    let property = path.with_file_name("property");
    if property.exists() && !path.exists() {
        let what = "exists already, of another set: the format has one set in a folder".to_owned();
        return Err(Error::Data { path: property, what });
    }
    Ok(())
}

/// Writes `NAME.rec`, `NAME.idx`, `NAME.lst` and `property` as insightface does: a first record with the keys of the
/// people's records, the images, and the people's records. If images are not grouped by person in the order of the
/// labels, only images are written.
///
/// # Errors
/// When an image cannot be read, a file cannot be written, or there are more than 16 million images and people; no file
/// is left then.
pub fn write_records(export: &mut Export, path: &Path) -> Result<()> {
    let num_images = export.len();
    if num_images + export.num_identities() >= MAX_EXACT {
        let what = format!(
            "f32 keys are exact up to {MAX_EXACT}: expected fewer images and people, found {num_images} images"
        );
        return Err(Error::Data { path: path.to_owned(), what });
    }
    let [rec, idx, lst, property] =
        [path.to_owned(), path.with_extension("idx"), path.with_extension("lst"), path.with_file_name("property")];
    check_records(path)?;
    // Declared first, so that it is empty when it is dropped.
    let _created = NewFolders::create(folder_of(path))?;
    let files = [Output::new(&rec)?, Output::new(&idx)?, Output::new(&lst)?, Output::new(&property)?];
    let [mut out_rec, mut out_idx, mut out_lst, mut out_property] =
        files.each_ref().map(|f| BufWriter::new(f.as_file()));
    let mut out = Records { rec: &mut out_rec, idx: &mut out_idx, position: 0, key: 0 };
    let ranges = export.ranges();
    if ranges.is_some() {
        let people = [num_images + 1, num_images + 1 + export.num_identities()];
        out.push(people.map(|key| key as f32).to_vec(), true, &[]).map_err(Error::io(&rec))?;
    }
    export.for_each(&mut |image| {
        let (key, label) = (out.key, image.label);
        if image.path().contains(['\t', '\n', '\r']) {
            let what = format!("expected names without tabs and line breaks, found {:?}", image.path());
            return Err(Error::Data { path: lst.clone(), what });
        }
        writeln!(out_lst, "{key}\t{label}\t{}", image.path()).map_err(Error::io(&lst))?;
        out.push(vec![label as f32], false, &image.bytes).map_err(Error::io(&rec))
    })?;
    for range in ranges.into_iter().flatten() {
        let keys = [range.start + 1, range.end + 1].map(|key| key as f32);
        out.push(keys.to_vec(), true, &[]).map_err(Error::io(&rec))?;
    }
    writeln!(out_property, "{},112,112", export.num_identities()).map_err(Error::io(&property))?;
    for (mut out, path) in [(out_rec, &rec), (out_idx, &idx), (out_lst, &lst), (out_property, &property)] {
        out.flush().map_err(Error::io(path))?;
    }
    // Move the records last: without them there is nothing to open.
    files.into_iter().rev().try_for_each(Output::finish)
}

struct Records<'a, 'f> {
    rec: &'a mut BufWriter<&'f File>,
    idx: &'a mut BufWriter<&'f File>,
    position: u64,
    key: u64,
}

impl Records<'_, '_> {
    fn push(&mut self, labels: Vec<f32>, is_list: bool, image: &[u8]) -> std::io::Result<()> {
        writeln!(self.idx, "{}\t{}", self.key, self.position)?;
        self.position += write_record(self.rec, &Header { labels, is_list, id: self.key }, image)?;
        self.key += 1;
        Ok(())
    }
}
