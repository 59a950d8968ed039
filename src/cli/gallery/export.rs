//! `maskinv gallery export`.

use std::path::Path;

use anyhow::{Result, bail};

use super::ExportArgs;
use crate::cli::{count_of, print};
use crate::files::{check_writable, remove_if_there, write_private};
use crate::gallery::{Gallery, StoredFace};
use crate::npy;

pub(super) fn run(args: &ExportArgs) -> Result<()> {
    let out = &args.output;
    if out.exists() {
        bail!("{}: exists already", out.display());
    }
    check_writable(out)?;
    let gallery = Gallery::open(&args.gallery)?;
    let num = match out.extension().and_then(|extension| extension.to_str()) {
        Some("npy") => write_npy(&gallery, out)?,
        Some("parquet") => write_parquet(&gallery, out)?,
        _ => bail!("{}: expected .npy or .parquet", out.display()),
    };
    print(&format!("{}: {}", out.display(), count_of(num, "face")))
}

fn write_npy(gallery: &Gallery, out: &Path) -> Result<usize> {
    let list = out.with_extension("csv");
    if list.exists() {
        bail!("{}: exists already", list.display());
    }
    let (mut faces, mut values): (Vec<StoredFace>, Vec<f32>) = (Vec::new(), Vec::new());
    gallery.for_each_face(|face, embedding| {
        faces.push(face);
        values.extend(embedding);
        Ok(())
    })?;
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    write_private(out, &npy::encode("<f4", &[faces.len(), gallery.model().embedding_size], bytes))?;
    // Without the list the numbers are of no use.
    write_private(&list, csv(&faces)?.as_bytes()).inspect_err(|_| {
        let _ = remove_if_there(out);
    })?;
    Ok(faces.len())
}

#[cfg(feature = "parquet")]
fn write_parquet(gallery: &Gallery, out: &Path) -> Result<usize> {
    Ok(crate::gallery::export_parquet(gallery, out)?)
}

#[cfg(not(feature = "parquet"))]
fn write_parquet(_: &Gallery, out: &Path) -> Result<usize> {
    bail!("{}: {}", out.display(), crate::error::missing_feature("parquet"))
}

/// Formats one row per face, in the order of the embeddings.
fn csv(faces: &[StoredFace]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for face in faces {
        writer.serialize(face)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}
