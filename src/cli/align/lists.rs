//! The lists of faces and of photos without a crop, as CSV.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::work::Done;
use crate::face::Face;

/// Returns the lists of faces and of photos that are left out, as CSV.
pub(super) fn lists(root: &Path, inputs: &[PathBuf], done: &[Done]) -> Result<(Vec<u8>, Vec<u8>)> {
    let name = |photo: &Done| {
        let path = &inputs[photo.photo];
        path.strip_prefix(root)
            .ok()
            .filter(|inside| !inside.as_os_str().is_empty())
            .unwrap_or(path)
            .display()
            .to_string()
    };
    let mut faces = csv::Writer::from_writer(Vec::new());
    let points = ["lex", "ley", "rex", "rey", "nx", "ny", "lmx", "lmy", "rmx", "rmy"];
    let head = ["file", "photo", "num_faces", "score", "left", "top", "right", "bottom"];
    faces.write_record(head.into_iter().chain(points))?;
    let mut left_out = csv::Writer::from_writer(Vec::new());
    left_out.write_record(["photo", "num_faces", "reason"])?;
    for photo in done {
        for (file, found) in &photo.crops {
            let mut row = vec![file.clone(), name(photo), photo.num_faces.to_string()];
            match found {
                Some(face) => {
                    let Face { score, bounds, .. } = face;
                    let landmarks = face.points()?;
                    row.push(format!("{score:.4}"));
                    row.extend(bounds.iter().chain(landmarks.as_flattened()).map(|v| format!("{v:.2}")));
                }
                None => row.resize(head.len() + points.len(), String::new()),
            }
            faces.write_record(row)?;
        }
        if let Some(reason) = &photo.left_out {
            left_out.write_record([name(photo), photo.num_faces.to_string(), reason.clone()])?;
        }
    }
    Ok((faces.into_inner()?, left_out.into_inner()?))
}
