//! `maskinv data info`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::model::HubArgs;
use crate::cli::progress::Progress;
use crate::cli::{print, print_json};
use crate::data::{check, open_source};

/// Upper ends of the histogram's bins, in images per person.
const RANGES: [usize; 10] = [1, 2, 4, 9, 19, 49, 99, 199, 499, usize::MAX];
/// Length of the histogram's longest bar, in characters.
const BAR: usize = 40;

/// Arguments of `maskinv data info`.
#[derive(Args, Debug)]
pub(super) struct InfoArgs {
    /// Folders of people, .rec, .tar or .parquet files, or lists of images
    #[arg(required = true, value_name = "DATA")]
    data: Vec<PathBuf>,
    /// Decode every image and report the broken ones
    #[arg(long)]
    decode: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl InfoArgs {
    pub(super) fn run(self, hub: &HubArgs) -> Result<()> {
        let mut records = Vec::new();
        for path in &self.data {
            let source = open_source(&hub.dataset(path)?)?;
            let images = source.images.as_ref();
            let mut counts = images.images_per_identity();
            counts.sort_unstable();
            let mut progress = Progress::new();
            let mut on = |done| progress.count("decode", "images decoded", done, images.len());
            let broken = self.decode.then(|| check(images, &mut on).broken);
            if self.json {
                records.push(serde_json::json!({
                    "path": source.path,
                    "format": source.format.to_string(),
                    "num_images": images.len(),
                    "num_identities": images.num_identities(),
                    "people_by_images": histogram(&counts).iter().map(|(range, num)| serde_json::json!({"images": range, "people": num})).collect::<Vec<_>>(),
                    "broken": broken,
                }));
                continue;
            }
            let mut lines = vec![source.to_string(), spread(&counts), "images each  people".to_owned()];
            let histogram = histogram(&counts);
            let most = histogram.iter().map(|(_, num)| *num).max().unwrap_or(1).max(1);
            for (range, num) in &histogram {
                lines.push(format!("{range:>11}  {num:>7}  {}", "#".repeat((num * BAR).div_ceil(most))));
            }
            if let Some(broken) = broken {
                lines.push(format!("{} of {} images are broken", broken.len(), images.len()));
                lines.extend(broken.iter().take(20).map(|(_, what)| format!("  {what}")));
            }
            print(&lines.join("\n"))?;
        }
        if self.json { print_json(&records) } else { Ok(()) }
    }
}

/// Describes the range, median and mean of ascending counts.
fn spread(counts: &[usize]) -> String {
    let at = |share: f64| counts[((counts.len() - 1) as f64 * share).round() as usize];
    let mean = counts.iter().sum::<usize>() as f64 / counts.len() as f64;
    format!("images of a person: {} to {}, median {}, mean {mean:.1}", at(0.0), at(1.0), at(0.5))
}

/// Number of people in each bin of images per person; empty bins at the end are left out.
fn histogram(counts: &[usize]) -> Vec<(String, usize)> {
    let mut result = Vec::new();
    let mut first = 1;
    for last in RANGES {
        let num = counts.iter().filter(|&&count| (first..=last).contains(&count)).count();
        let range = match last {
            usize::MAX => format!("{first} and more"),
            last if last == first => first.to_string(),
            last => format!("{first} to {last}"),
        };
        result.push((range, num));
        first = last.saturating_add(1);
    }
    while result.last().is_some_and(|(_, num)| *num == 0) {
        result.pop();
    }
    result
}
