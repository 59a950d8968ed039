//! The protocol of pairs: U-U, U-M and M-M of the same ones, and photos as they are.

use anyhow::{Context, Result};
use image::RgbImage;

use super::Run;
use super::output::{Names, Output, title};
use super::provenance::sha256_of_images;
use crate::cli::progress::Progress;
use crate::data::TestSet;
use crate::eval::{Figures, MaskedFaces, compare, compare_as_is, figures};
use crate::report::{Hardest, REAL_MASKS};
use crate::train::Event;

/// Measures every model.
pub(super) fn measure(run: &Run) -> Result<Output> {
    let config = &run.config.eval;
    let test = run.config.data.open_test()?;
    let photos = run.config.data.open_real_masks()?;
    for set in [Some(&test), photos.as_ref()].into_iter().flatten() {
        if let Some(&first) = set.repeated_pairs().first() {
            let [a, b] = sides(set, first).map(|image| title(set.images.as_ref(), image));
            let (num, what) = (set.repeated_pairs().len(), &set.description);
            eprintln!("{what}: {num} pairs come again, the first one {a} and {b}: they count each time");
        }
    }
    let mut progress = Progress::new();
    let mut output = Output { title: test.description.clone(), ..Output::default() };
    if let Some(photos) = &photos {
        output.real_masks_title.clone_from(&photos.description);
    }
    let masked_faces = MaskedFaces::new(test.images.as_ref(), config)?;
    for named in run.models {
        let context = || named.name.clone();
        let mut on = |done, total| progress.show(Event::Embedded { done, total });
        let scores = compare(&named.model, &test, config, &mut on).with_context(context)?;
        let evaluation = figures(scores.iter().map(|(s, c)| (*s, c)), test.num_folds, config).with_context(context)?;
        for (setting, comparisons) in &scores {
            let face = |k: usize, side: usize| {
                let image = sides(&test, k)[side];
                let is_masked = setting.masked(config.mask.protocol, k, test.pairs.len())[side];
                let face = if is_masked { masked_faces.get(image)? } else { test.images.get(image)?.image };
                Ok((face, title(test.images.as_ref(), image)))
            };
            let result = evaluation.get(*setting).clone();
            let measured = output.take(run, &named.name, setting.name(), comparisons, result, &names(&test))?;
            if run.args.faces > 0 {
                measured.hardest = Some(Hardest::find(comparisons, run.args.faces, face)?);
            }
        }
        output.evaluations.push(evaluation);
        if let Some(photos) = &photos {
            let comparisons = compare_as_is(&named.model, photos, config, on).with_context(context)?;
            let result = Figures::new(&comparisons, photos.num_folds, &config.bootstrap)
                .and_then(|figures| figures.compute(None))
                .with_context(context)?;
            let face = |k: usize, side: usize| {
                let image = sides(photos, k)[side];
                Ok((photos.images.get(image)?.image, title(photos.images.as_ref(), image)))
            };
            let names = names(photos);
            let measured = output.take(run, &named.name, REAL_MASKS, &comparisons, result.clone(), &names)?;
            if run.args.faces > 0 {
                measured.hardest = Some(Hardest::find(&comparisons, run.args.faces, face)?);
            }
            output.real_masks.push(result);
        }
    }
    if run.args.report.is_some() {
        output.data_sha256 = Some(sha256(&test)?);
    }
    Ok(output)
}

fn sides(test: &TestSet, k: usize) -> [usize; 2] {
    [test.pairs[k].a, test.pairs[k].b]
}

fn names(test: &TestSet) -> Names<'_> {
    Names {
        images: Box::new(|k| sides(test, k).map(|image| test.images.name(image))),
        person: Box::new(|label| test.images.identity_name(label)),
    }
}

fn sha256(test: &TestSet) -> Result<String> {
    let used = test.used_images();
    let number = |image: usize| used.binary_search(&image).expect("the images of all pairs are used");
    let pairs: Vec<_> = test.pairs.iter().map(|p| (number(p.a), number(p.b), p.is_same)).collect();
    let image = |i: usize| -> crate::Result<RgbImage> { Ok(test.images.get(used[i])?.image) };
    sha256_of_images(used.len(), image, &format!("{pairs:?}"))
}
