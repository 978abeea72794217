//! Another OCI runtime than the built-in one: a program with runc's commands.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

/// A runtime's program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalRuntime {
    /// What users call it.
    pub name: String,
    pub path: PathBuf,
    /// Stand before the command.
    pub args: Vec<String>,
}

/// What a process's standard streams are.
pub(crate) enum Streams<'a> {
    Pipes([&'a OwnedFd; 3]),
    /// The runtime makes a terminal, and sends its other side to this socket.
    Terminal(PathBuf),
}

/// A runtime, and where it keeps what it knows of containers.
pub(crate) struct Runner<'a> {
    pub(crate) runtime: &'a ExternalRuntime,
    pub(crate) root: &'a Path,
}

impl Runner<'_> {
    /// Makes a container from a bundle and starts it; returns its first process, whose parent is whoever
    /// calls this, if that adopts orphans. `dir` is for files in between.
    pub(crate) fn run(&self, id: &str, bundle: &Path, dir: &Path, streams: &Streams<'_>) -> Result<i32, String> {
        let bundle = bundle.display().to_string();
        let pid = self.begin(&["create", "--bundle", &bundle], id, dir, streams)?;
        if let Err(reason) = self.ask(&["start", id], dir) {
            // The first error is the one to tell.
            let _ = self.delete(id, dir);
            return Err(reason);
        }
        Ok(pid)
    }

    /// Starts one more process in a container, as a file with the runtime-spec's `process` says.
    pub(crate) fn exec(&self, id: &str, process: &Path, dir: &Path, streams: &Streams<'_>) -> Result<i32, String> {
        let process = process.display().to_string();
        self.begin(&["exec", "--detach", "--process", &process], id, dir, streams)
    }

    pub(crate) fn set_paused(&self, id: &str, paused: bool, dir: &Path) -> io::Result<()> {
        self.ask(&[if paused { "pause" } else { "resume" }, id], dir).map_err(io::Error::other)
    }

    /// Forgets a container, and ends what is left of it; doing so twice is harmless.
    pub(crate) fn delete(&self, id: &str, dir: &Path) -> io::Result<()> {
        if !self.root.join(id).exists() {
            return Ok(());
        }
        self.ask(&["delete", "--force", id], dir).map_err(io::Error::other)
    }

    fn begin(&self, command: &[&str], id: &str, dir: &Path, streams: &Streams<'_>) -> Result<i32, String> {
        let pid_file = dir.join("runtime.pid");
        let mut runtime = self.command(dir);
        runtime.args(command).arg("--pid-file").arg(&pid_file);
        match streams {
            Streams::Pipes([stdin, stdout, stderr]) => {
                let copy = |fd: &OwnedFd| fd.try_clone().map(Stdio::from).map_err(|error| error.to_string());
                runtime.stdin(copy(stdin)?).stdout(copy(stdout)?).stderr(copy(stderr)?);
            }
            Streams::Terminal(socket) => {
                runtime.arg("--console-socket").arg(socket);
                runtime.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        self.finish(runtime.arg(id), dir)?;
        let pid = fs::read_to_string(&pid_file).map_err(|error| format!("{}: {error}", pid_file.display()))?;
        pid.trim().parse().map_err(|_| format!("{} told no process: {pid:?}", self.runtime.name))
    }

    fn ask(&self, command: &[&str], dir: &Path) -> Result<(), String> {
        let mut runtime = self.command(dir);
        runtime.args(command).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.finish(&mut runtime, dir)
    }

    fn command(&self, dir: &Path) -> Command {
        let mut command = Command::new(&self.runtime.path);
        command.args(&self.runtime.args).arg("--root").arg(self.root);
        command.arg("--log").arg(log_file(dir)).args(["--log-format", "json"]);
        command
    }

    fn finish(&self, command: &mut Command, dir: &Path) -> Result<(), String> {
        let name = &self.runtime.name;
        let log = log_file(dir);
        // What an earlier command complained of is not this one's reason.
        let _ = fs::remove_file(&log);
        let status =
            command.status().map_err(|error| format!("runtime {name} ({}): {error}", self.runtime.path.display()))?;
        if status.success() {
            return Ok(());
        }
        let told = fs::read_to_string(&log).unwrap_or_default();
        Err(last_message(&told).unwrap_or_else(|| format!("runtime {name} failed ({status}) and says no more")))
    }
}

fn log_file(dir: &Path) -> PathBuf {
    dir.join("runtime.log")
}

/// The last message of a log in JSON lines.
fn last_message(log: &str) -> Option<String> {
    let message = |line: &str| Some(serde_json::from_str::<serde_json::Value>(line).ok()?["msg"].as_str()?.to_owned());
    log.lines().rev().find_map(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_runtime_complained_of_last_is_told() {
        let log = "{\"level\":\"warn\",\"msg\":\"first\"}\n{\"level\":\"error\",\"msg\":\"no such file\"}\nnonsense\n";
        assert_eq!(last_message(log).as_deref(), Some("no such file"));
        let dir = tempfile::tempdir().unwrap();
        let runtime = ExternalRuntime { name: "gone".into(), path: "/not/there".into(), args: Vec::new() };
        fs::create_dir(dir.path().join("id")).unwrap();
        let error = Runner { runtime: &runtime, root: dir.path() }.delete("id", dir.path()).unwrap_err().to_string();
        assert!(error.contains("gone") && error.contains("/not/there"), "{error}");
    }
}
