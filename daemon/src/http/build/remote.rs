//! Contexts that the daemon fetches itself: archives, single Dockerfiles, and repositories of git.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use skep_api::with_causes;
use tokio::process::Command;

/// How long a repository may take to come.
const GIT_LIMIT: Duration = Duration::from_secs(600);
/// Ways to repositories that are not this host's own files.
const GIT_PROTOCOLS: &str = "git:http:https:ssh";

/// A context that lies on disk.
pub(super) struct Fetched {
    pub(super) root: PathBuf,
    /// Whether a Dockerfile alone came, whatever it is called where it came from.
    pub(super) is_dockerfile: bool,
}

/// Fetches a context into a directory.
pub(super) async fn fetch(remote: &str, into: &Path) -> Result<Fetched, String> {
    if let Some(repository) = Repository::read(remote) {
        return repository.fetch(into).await.map(|root| Fetched { root, is_dockerfile: false });
    }
    if !remote.starts_with("http://") && !remote.starts_with("https://") {
        return Err(format!(
            "the context {remote:?} is not supported: give the URL of an archive, of a Dockerfile or of a git repository"
        ));
    }
    let bytes = skep_engine::fetch(remote).await?;
    let dir = into.to_owned();
    let fetched = |is_dockerfile| Fetched { root: into.to_owned(), is_dockerfile };
    let is_text = std::str::from_utf8(&bytes).is_ok_and(|text| !text.contains('\0'));
    if is_text {
        let written = std::fs::write(dir.join("Dockerfile"), bytes);
        return written.map(|()| fetched(true)).map_err(|error| error.to_string());
    }
    let unpacked = tokio::task::spawn_blocking(move || skep_engine::unpack_context(bytes.as_slice(), &dir)).await;
    unpacked.map_err(|error| error.to_string())?.map(|()| fetched(false)).map_err(|error| with_causes(&error))
}

/// `URL[#REFERENCE[:DIRECTORY]]`
#[derive(Debug, PartialEq, Eq)]
struct Repository {
    url: String,
    /// A branch, tag or commit; what the repository has for its head if empty.
    reference: String,
    directory: String,
}

impl Repository {
    /// None: it is no repository, as far as the text tells.
    fn read(remote: &str) -> Option<Self> {
        let (url, rest) = remote.split_once('#').unwrap_or((remote, ""));
        let (reference, directory) = rest.split_once(':').unwrap_or((rest, ""));
        let over_http = (url.starts_with("http://") || url.starts_with("https://")) && url.ends_with(".git");
        let by_itself = ["git://", "git@", "ssh://"].iter().any(|start| url.starts_with(start));
        let url = match url.strip_prefix("github.com/") {
            Some(_) => format!("https://{url}"),
            None if over_http || by_itself => url.to_owned(),
            None => return None,
        };
        Some(Self { url, reference: reference.to_owned(), directory: directory.to_owned() })
    }

    /// Fetches the one commit that is asked for; returns where the context is.
    async fn fetch(&self, into: &Path) -> Result<PathBuf, String> {
        let reference = if self.reference.is_empty() { "HEAD" } else { &self.reference };
        if reference.starts_with('-') {
            return Err(format!("{reference:?} is no name of a commit"));
        }
        git(into, &["init", "--quiet"]).await?;
        if let Err(error) = git(into, &["fetch", "--quiet", "--depth=1", "--", &self.url, reference]).await {
            // A server of files alone has all of the history or nothing.
            if !error.contains("does not support shallow") {
                return Err(error);
            }
            git(into, &["fetch", "--quiet", "--", &self.url, reference]).await?;
        }
        git(into, &["checkout", "--quiet", "FETCH_HEAD"]).await?;
        if into.join(".gitmodules").exists() {
            git(into, &["submodule", "--quiet", "update", "--init", "--recursive", "--depth=1"]).await?;
        }
        let wrong = |why: &str| format!("directory {:?} of {}: {why}", self.directory, self.url);
        let (top, root) = (into.canonicalize(), into.join(self.directory.trim_start_matches('/')).canonicalize());
        let (top, root) = (top.map_err(|e| wrong(&e.to_string()))?, root.map_err(|e| wrong(&e.to_string()))?);
        if !root.starts_with(&top) || !root.is_dir() {
            return Err(wrong("it is none of the repository's"));
        }
        let history = std::fs::remove_dir_all(into.join(".git"));
        history.map(|()| root).map_err(|error| wrong(&error.to_string()))
    }
}

/// Runs git, which asks nobody anything, runs nothing of the repository's, and reads no repository of this host's.
async fn git(dir: &Path, args: &[&str]) -> Result<(), String> {
    let mut command = Command::new("git");
    command.args(["-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-C"]).arg(dir).args(args);
    command.env("GIT_TERMINAL_PROMPT", "0").env("GIT_ALLOW_PROTOCOL", GIT_PROTOCOLS);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(GIT_LIMIT, command.output()).await {
        Err(_) => return Err(format!("git {} took longer than {GIT_LIMIT:?}", args[0])),
        Ok(Err(error)) => return Err(format!("git cannot be run on the daemon's host ({error}): install it")),
        Ok(Ok(output)) => output,
    };
    let told = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("git {} failed: {}", args[0], told.trim())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_told_from_archives() {
        let read = |remote: &str| Repository::read(remote).map(|r| (r.url, r.reference, r.directory));
        let parts =
            |url: &str, reference: &str, dir: &str| Some((url.to_owned(), reference.to_owned(), dir.to_owned()));
        assert_eq!(read("https://host/a.git#v1:sub/dir"), parts("https://host/a.git", "v1", "sub/dir"));
        assert_eq!(read("git://host/a#:sub"), parts("git://host/a", "", "sub"));
        assert_eq!(read("git@host:a/b"), parts("git@host:a/b", "", ""));
        assert_eq!(read("github.com/a/b"), parts("https://github.com/a/b", "", ""));
        for other in ["https://host/a.tar.gz", "https://host/Dockerfile", "file:///srv/a.git", "-u.git", "/srv/a.git"] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
