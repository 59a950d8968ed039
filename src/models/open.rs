//! Loading of a model by path, `hf://` reference or short name.

use super::{LoadConfig, Loaded, load_bundled, load_model_with};
use crate::error::{Error, Result};
use crate::weights::{Hub, ModelRef, WeightsFile};

/// Loads the model that `name` refers to, frozen: a path, `hf://owner/repo[@revision]/file` or a short name of the
/// [`manifest`](crate::weights::manifest), which also states its preprocessing. `output` is that of [`LoadConfig`];
/// `progress` receives bytes done and bytes in total during a download.
///
/// # Errors
/// When `name` is unknown, the file cannot be fetched ([`Hub::fetch`]) or loaded ([`load_model_with`]), or its network is
/// not the one that the manifest states.
pub fn open_model(name: &str, output: Option<&str>, hub: &Hub, progress: &mut dyn FnMut(u64, u64)) -> Result<Loaded> {
    let reference = ModelRef::parse(name)?;
    if let ModelRef::Detector(_) = reference {
        let what = "expected a network for faces, found a face detector (--detector)".to_owned();
        return Err(Error::Hub { reference: name.to_owned(), what });
    }
    let entry = reference.entry();
    let loaded = match hub.resolve(&reference, progress)? {
        WeightsFile::Path(path) => {
            let preprocessing = entry.map(|e| e.preprocessing.clone());
            load_model_with(&path, &LoadConfig { preprocessing, output: output.map(str::to_owned) })?
        }
        WeightsFile::Bundled(bundled) => load_bundled(bundled)?,
    };
    if let Some(entry) = entry {
        let config = loaded.model.config();
        let expected = (entry.arch.as_str(), entry.embedding_size, entry.input_size);
        let found = (config.arch.name(), config.embedding_size, config.input_size);
        if expected != found {
            let what = format!("expected (network, embedding, input) {expected:?} as in the manifest, found {found:?}");
            return Err(Error::Hub { reference: name.to_owned(), what });
        }
    }
    Ok(loaded)
}
