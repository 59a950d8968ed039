//! Requests to the hub for a file's metadata and its bytes, and messages for refused requests.

use std::io::Write;
use std::time::Duration;

use futures_util::StreamExt;
use hf_hub::{HFClient, HFClientBuilder, HFError};
use reqwest::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, ETAG, HeaderMap, LOCATION};
use reqwest::{Client, Url, redirect};

use super::HubConfig;
use super::cache::is_commit;
use crate::error::{Error, Result};
use crate::weights::hub_file::HubFile;
use crate::weights::manifest::is_sha256;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for the next bytes; a download as a whole has no time limit.
const READ_LIMIT: Duration = Duration::from_secs(30);
/// Number of retries after the first attempt, both in hf-hub and here.
pub(super) const RETRIES: u32 = 3;
/// Delay before the first retry; it doubles each time.
pub(super) const RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_REDIRECTS: usize = 5;
/// Placeholder that stops hf-hub from looking for a token in the environment and the user's folder. hf-hub never sends
/// it, because it is not valid in a header.
const NO_TOKEN: &str = "\n";

/// Metadata of a file on the hub.
#[derive(Debug)]
pub(super) struct Remote {
    /// Commit that the revision points to.
    pub commit: String,
    /// Identifier of the contents; their SHA-256 for large files.
    pub etag: String,
    /// Length in bytes.
    pub size: u64,
}

impl Remote {
    /// Returns the SHA-256 of the contents, if the hub reports it.
    pub fn sha256(&self) -> Option<&str> {
        Some(self.etag.as_str()).filter(|etag| is_sha256(etag))
    }
}

/// Reason why a download stopped.
pub(super) enum Stop {
    /// A failure that a retry may fix.
    Broken(String),
    /// The server does not support range requests.
    NoRange,
    /// A failure that retries cannot fix.
    Final(Error),
}

/// Returns the hub's base URL.
pub(super) fn endpoint(config: &HubConfig) -> Result<Url, String> {
    let text = config.endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT);
    let endpoint = Url::parse(text).map_err(|e| format!("endpoint {text:?} (HF_ENDPOINT): {e}"))?;
    if !matches!(endpoint.scheme(), "http" | "https") || endpoint.cannot_be_a_base() {
        return Err(format!("endpoint {text:?} (HF_ENDPOINT): expected http:// or https://"));
    }
    Ok(endpoint)
}

/// Returns a builder of hf-hub's client with this module's limits and the configured token.
pub(super) fn builder(config: &HubConfig, endpoint: &Url) -> Result<HFClientBuilder, String> {
    Ok(HFClient::builder()
        .endpoint(endpoint.as_str())
        .token(config.token.as_deref().unwrap_or(NO_TOKEN))
        .client(http(endpoint, redirect::Policy::limited(MAX_REDIRECTS))?)
        .retry_max_attempts(RETRIES as usize)
        .retry_base_delay(RETRY_DELAY))
}

fn http(endpoint: &Url, policy: redirect::Policy) -> Result<Client, String> {
    let mut builder = Client::builder()
        .user_agent(concat!("maskinv/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_LIMIT)
        .read_timeout(READ_LIMIT)
        .redirect(policy);
    // A server on this machine is never reached through the environment's proxy.
    if matches!(endpoint.host_str(), Some("localhost" | "127.0.0.1" | "[::1]")) {
        builder = builder.no_proxy();
    }
    let failed = |e| format!("no HTTPS client (are the system's CA certificates installed?): {}", root_cause(&e));
    builder.build().map_err(failed)
}

/// A connection to the hub for one file.
pub(super) struct HubClient<'a> {
    config: &'a HubConfig,
    file: &'a HubFile,
    endpoint: Url,
    hub: HFClient,
    /// Does not follow redirects.
    direct: Client,
}

impl<'a> HubClient<'a> {
    pub fn new(config: &'a HubConfig, file: &'a HubFile) -> Result<Self> {
        let wrong = |what: String| Error::Hub { reference: file.to_string(), what };
        let endpoint = endpoint(config).map_err(wrong)?;
        let hub = builder(config, &endpoint).map_err(wrong)?.cache_enabled(false);
        let hub = hub.build().map_err(|e| wrong(format!("no HTTPS client: {e}")))?;
        let direct = http(&endpoint, redirect::Policy::none()).map_err(wrong)?;
        Ok(Self { config, file, hub, direct, endpoint })
    }

    /// Requests the file's metadata. hf-hub cannot do it: it follows the redirect to the storage, whose response lacks
    /// the commit.
    pub async fn head(&self) -> Result<Remote> {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            let file = self.file;
            path.pop_if_empty().extend([file.owner(), file.repo(), "resolve", file.revision()]);
            path.extend(file.file().split('/'));
        }
        let mut redirects = 0;
        let mut tries = 0;
        loop {
            let mut request = self.direct.head(url.clone());
            if let Some(token) = &self.config.token {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = match request.send().await {
                Ok(r) if r.status().is_server_error() && tries < RETRIES => None,
                Ok(response) => Some(response),
                Err(e) if (e.is_connect() || e.is_timeout() || e.is_request()) && tries < RETRIES => None,
                Err(e) => return Err(self.unreachable(&e)),
            };
            let Some(response) = response else {
                tokio::time::sleep(RETRY_DELAY * 2u32.pow(tries)).await;
                tries += 1;
                continue;
            };
            let (status, headers) = (response.status(), response.headers());
            // A renamed repository redirects within the hub. A large file redirects to the storage; this response is
            // then complete.
            let location = header(headers, LOCATION.as_str()).and_then(|l| url.join(l).ok());
            // Follow redirects within the hub only: nobody else may receive the token.
            match location.filter(|next| next.origin() == self.endpoint.origin()) {
                Some(next) if status.is_redirection() && redirects < MAX_REDIRECTS => {
                    url = next;
                    redirects += 1;
                }
                _ if status.is_success() || status.is_redirection() => {
                    return self.remote(headers, status.is_success());
                }
                _ => {
                    let (code, message) = (header(headers, "x-error-code"), header(headers, "x-error-message"));
                    return Err(self.refused(status.as_u16(), code, message));
                }
            }
        }
    }

    fn remote(&self, headers: &HeaderMap, has_contents: bool) -> Result<Remote> {
        if let Some(encoding) = header(headers, CONTENT_ENCODING.as_str()).filter(|encoding| *encoding != "identity") {
            return Err(self.error(format!(
                "a proxy before {} compresses its answers ({encoding}), which nobody asked for: go around it (NO_PROXY)",
                self.endpoint
            )));
        }
        let etag = header(headers, "x-linked-etag").or_else(|| header(headers, ETAG.as_str())).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"');
        let commit = header(headers, "x-repo-commit").unwrap_or_default();
        let length = header(headers, CONTENT_LENGTH.as_str()).filter(|_| has_contents);
        let size = header(headers, "x-linked-size").or(length).and_then(|s| s.parse().ok());
        // Both are used as file names.
        let is_etag = (1..=128).contains(&etag.len())
            && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        match size {
            Some(size) if is_etag && is_commit(commit) => Ok(Remote { commit: commit.into(), etag: etag.into(), size }),
            _ => Err(self.error(format!(
                "{} is not a model hub: expected a commit, an ETag and a size, found {commit:?}, {etag:?} and {size:?}",
                self.endpoint
            ))),
        }
    }

    /// Appends the file's bytes from `done` on to `out`, and advances `done`.
    pub async fn read(
        &self,
        remote: &Remote,
        done: &mut u64,
        out: &mut impl Write,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Stop> {
        let remaining = remote.size - *done;
        let repo = self.hub.model(self.file.owner(), self.file.repo());
        let (length, mut pieces) = repo
            .download_file_stream()
            .filename(self.file.file())
            .revision(remote.commit.as_str())
            .maybe_range((*done > 0).then_some(*done..remote.size))
            .send()
            .await
            .map_err(|e| self.stop(&e))?;
        // hf-hub does not tell a 206 response from a 200; the length does.
        if *done > 0 && length != Some(remaining) {
            return Err(Stop::NoRange);
        }
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|e| self.stop(&e))?;
            *done += piece.len() as u64;
            if *done > remote.size {
                return Err(Stop::Final(self.error(format!("expected {} bytes, received more", remote.size))));
            }
            out.write_all(&piece).map_err(|e| Stop::Final(self.error(format!("cannot write to the cache: {e}"))))?;
            progress(*done);
        }
        if *done < remote.size { Err(Stop::Broken("the connection was closed early".into())) } else { Ok(()) }
    }

    fn stop(&self, error: &HFError) -> Stop {
        Stop::Final(match error {
            HFError::Request { source, .. } if !source.is_redirect() => return Stop::Broken(root_cause(source)),
            HFError::Xet { source, .. } => return Stop::Broken(root_cause(source.as_ref())),
            HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::RateLimited { context, .. }
            | HFError::Http { context }
            | HFError::RepoNotFound { context: Some(context), .. }
            | HFError::RevisionNotFound { context: Some(context), .. }
            | HFError::EntryNotFound { context: Some(context), .. } => {
                self.refused(context.status.as_u16(), context.error_code.as_deref(), context.server_message.as_deref())
            }
            other => self.error(other.to_string()),
        })
    }

    fn unreachable(&self, error: &reqwest::Error) -> Error {
        self.error(format!(
            "{} cannot be reached ({}): check the network or HF_ENDPOINT, or use cached files with --offline",
            self.endpoint,
            root_cause(error)
        ))
    }

    /// Returns the error for a response with a failure status.
    fn refused(&self, status: u16, code: Option<&str>, message: Option<&str>) -> Error {
        let (repo, revision) = (format!("{}/{}", self.file.owner(), self.file.repo()), self.file.revision());
        let mut what = match (status, code) {
            (401, _) if self.config.token.is_none() => {
                format!("{repo} is private or gated, or does not exist: set HF_TOKEN to a token with access to it")
            }
            (401, _) => format!("the token in HF_TOKEN was rejected, or {repo} does not exist"),
            (403, _) if self.config.token.is_none() => {
                format!("{repo} is gated: request access at {}{repo}, then set HF_TOKEN", self.endpoint)
            }
            (403, _) => format!("HF_TOKEN has no access to {repo}: request it at {}{repo}", self.endpoint),
            (404, Some("RepoNotFound")) => {
                format!("there is no repository {repo}, or it is private and needs HF_TOKEN")
            }
            (404, Some("RevisionNotFound")) => format!("{repo} has no revision {revision}"),
            (404, Some("EntryNotFound")) => format!("{repo} has no file {} at {revision}", self.file.file()),
            (404, _) => "the repository, the revision or the file was not found".into(),
            (429, _) => "too many requests: wait a while, or set HF_TOKEN".into(),
            _ => format!("{} refused the request", self.endpoint),
        };
        what.push_str(&format!(" (HTTP {status}"));
        if let Some(message) = message {
            what.push_str(": ");
            what.extend(message.chars().filter(|c| !c.is_control()).take(200));
        }
        what.push(')');
        self.error(what)
    }

    pub fn error(&self, what: String) -> Error {
        Error::Hub { reference: self.file.to_string(), what }
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Returns the innermost error's message; the outer errors only repeat the URL.
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}
