//! `--protocol ijb`: IJB-B and IJB-C.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::Job;
use super::output::{Output, Pairs, TEMPLATES};
use super::provenance::sha256_of_images;
use crate::cli::progress::Progress;
use crate::data::{PersonTemplate, TemplateSet};
use crate::eval::{EmbedConfig, FMR_TARGETS, Figures, Searches, Templates, embed};
use crate::report::Searched;

/// Evaluates every model.
pub(super) fn measure(run: &Job) -> Result<Output> {
    let config = &run.config.eval;
    let root = run.root()?;
    let set = TemplateSet::open(root)?;
    let people = set.people()?;
    let (num, num_pairs) = (set.images.len(), set.pairs.len());
    let title = format!("{} of {}: {num} images, {num_pairs} pairs of templates", set.name(), root.display());
    let mut output = Output { title, ..Output::default() };
    let mut progress = Progress::new();
    for named in run.models {
        let context = || named.name.clone();
        let embedding = EmbedConfig { batch_size: config.batch_size, normalize: false, ..EmbedConfig::default() };
        let on = |done| run.show(&mut progress, done, num);
        let features = embed(&named.model, num, |i| set.face(i), embedding, on).with_context(context)?;
        let templates = Templates::pool(&set.images, &features).with_context(context)?;
        if !set.pairs.is_empty() {
            let comparisons = templates.compare(&set.pairs, &people).with_context(context)?;
            let figures = Figures::new(&comparisons, 0, &config.bootstrap).with_context(context)?;
            let result = figures.compute(None).with_context(context)?;
            output.notes.push(as_published(&named.name, &figures));
            let pairs = Pairs {
                images: Box::new(|k| [set.pairs[k].a, set.pairs[k].b].map(|template| format!("template {template}"))),
                person: Box::new(|person| person.to_string()),
                face: None,
            };
            output.take(run, &named.name, TEMPLATES, &figures, result, &pairs)?;
        }
        let side = |list: &[PersonTemplate]| {
            let rows = templates.rows(list.iter().map(|t| t.template))?;
            Ok::<_, crate::Error>((rows, list.iter().map(|t| t.person).collect::<Vec<u32>>()))
        };
        for gallery in &set.galleries {
            let ((probes, people), (known, known_people)) = (side(&set.probes)?, side(&gallery.templates)?);
            let searches = Searches::run(&probes, &people, &known, &known_people);
            let result = searches.and_then(|searches| searches.figures(&config.bootstrap));
            let result = result.with_context(|| format!("{}: gallery {}", named.name, gallery.name))?;
            output.searched.push(Searched { model: named.name.clone(), gallery: gallery.name.clone(), result });
        }
    }
    if run.args.report.is_some() {
        let lists: BTreeMap<_, _> = set.galleries.iter().map(|g| (&g.name, &g.templates)).collect();
        let what = format!("{:?} {:?} {lists:?} {:?}", set.images, set.pairs, set.probes);
        output.data_sha256 = Some(sha256_of_images(num, |i| set.face(i), &what)?);
    }
    Ok(output)
}

/// Formats the rates that insightface's script prints.
fn as_published(model: &str, figures: &Figures) -> String {
    let cell = |target: f64| {
        let [tar, far] = figures.scores().tar_at_closest_far(target);
        format!("\n  {target:>8e} {:>8.2} {far:>12.2e}", 100.0 * tar)
    };
    let rows: String = FMR_TARGETS.into_iter().map(cell).collect();
    format!(
        "{model}, TAR at the closest FAR of the ROC curve, as in insightface's script:\n  {:>8} {:>8} {:>12}{rows}",
        "FAR", "TAR %", "actual FAR"
    )
}
