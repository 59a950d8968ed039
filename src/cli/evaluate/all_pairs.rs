//! `--protocol all-pairs`.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use image::RgbImage;

use super::Job;
use super::output::{Output, Pairs, title};
use super::provenance::sha256_of_images;
use crate::cli::photos::Cropped;
use crate::cli::progress::Progress;
use crate::cli::tell;
use crate::data::mask::MaskProtocol;
use crate::data::{Dataset, Subset, read_conditions, rows_without_images};
use crate::eval::{Evaluation, MaskedFaces, compare_all_pairs, figures};
use crate::report::LeftOut;

/// Evaluates every model.
pub(super) fn measure(run: &Job) -> Result<Output> {
    let config = &run.config.eval;
    run.root()?;
    let (images, source) = run.config.data.open_test_images()?;
    let mut progress = Progress::new();
    let used: Vec<usize> = (0..images.len()).collect();
    let Cropped { images, usable, unusable } = run.in_photos(&images, &used, &mut progress)?;
    let images = match unusable.len() {
        0 => images,
        _ => Arc::new(Subset::of_images(images, &usable).context("no image is left")?),
    };
    let images = images.as_ref();
    let worn = run.args.worn.as_deref().map(|list| worn(images, list)).transpose()?;
    let description = match &worn {
        Some(worn) => {
            let num = worn.iter().filter(|is_worn| **is_worn).count();
            format!("all pairs of {source}, {num} images with masks")
        }
        None => format!("all pairs of {source}, with and without drawn masks, seed {}", config.seed),
    };
    let left_out = LeftOut { images: unusable.len(), pairs: 0 };
    let description = match left_out.images {
        0 => description,
        num => format!("{description}, less {num} images that cannot be used"),
    };
    let mut output = Output { title: description, left_out, ..Output::default() };
    let masked_faces = MaskedFaces::new(images, config)?;
    for named in run.models {
        let context = || named.name.clone();
        let on = |done, total| run.show(&mut progress, done, total);
        let found = compare_all_pairs(&named.model, images, worn.as_deref(), config, on).with_context(context)?;
        let prepared = figures(found.iter().map(|(s, (_, c))| (*s, c)), 0, config).with_context(context)?;
        let evaluation = Evaluation::of(&prepared).with_context(context)?;
        for (setting, figures) in &prepared {
            let (pairs, _) = &found[setting];
            let face = |k: usize, side: usize| {
                let image = pairs.images_of(k)[side];
                let is_drawn = worn.is_none() && setting.masked(MaskProtocol::Corrected, k, pairs.len())[side];
                let face = if is_drawn { masked_faces.get(image)? } else { images.get(image)?.image };
                Ok((face, title(images, image)))
            };
            let shown = Pairs {
                images: Box::new(|k| pairs.images_of(k).map(|image| images.name(image))),
                person: Box::new(|label| images.identity_name(label)),
                face: Some(Box::new(face)),
            };
            let result = evaluation.get(*setting).expect("it was computed from `prepared`").clone();
            output.take(run, &named.name, setting.name(), figures, result, &shown)?;
        }
        output.evaluations.push(evaluation);
    }
    if run.args.report.is_some() {
        let image = |i: usize| -> crate::Result<RgbImage> { Ok(images.get(i)?.image) };
        let labels: Vec<u32> = (0..images.len()).map(|i| images.label(i)).collect();
        output.data_sha256 = Some(sha256_of_images(images.len(), image, &format!("{labels:?} {worn:?}"))?);
    }
    Ok(output)
}

/// Returns, for each image, whether the person wears a mask.
fn worn(images: &dyn Dataset, list: &std::path::Path) -> Result<Vec<bool>> {
    let conditions = read_conditions(list, "masked")?;
    if let Some(left_out) = rows_without_images(&conditions, images) {
        tell(format_args!("{}: {left_out}", list.display()));
    }
    let of_image = |i: usize| {
        let name = images
            .person_and_file(i)
            .with_context(|| format!("{}: expected file names, found none", images.name(i)))?;
        match conditions.get(&name) {
            Some(&is_worn) => Ok(is_worn),
            None => bail!("{}: expected a row for {name}, found none", list.display()),
        }
    };
    (0..images.len()).map(of_image).collect()
}
