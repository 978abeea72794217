//! The process that watches one container: it makes the container (libcontainer), then replaces
//! itself by a far smaller image of itself, which only copies output and waits.
//!
//! `skep shim DIR` reads `DIR/shim.json`, makes and starts the container, says so in one line on
//! standard output, and becomes `skep shim-watch …` by exec: the container stays its child. The
//! watcher writes `DIR/exit.json` when the container's first process has ended, and goes.

use std::ffi::CString;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe, read, setsid};
use serde::{Deserialize, Serialize};
use skep_api::{Timestamp, with_causes};

use crate::container::config::{LogConfig, LogDriver};
use crate::container::logs::{LogWriter, Stream};
use crate::container::seccomp::FilteredExecutor;
use crate::container::state::ExitRecord;
use crate::{disk, sys};

/// What the daemon tells the shim.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ShimConfig {
    pub(crate) id: String,
    /// libcontainer's state of all containers.
    pub(crate) root: PathBuf,
    /// Where `config.json` lies.
    pub(crate) bundle: PathBuf,
    pub(crate) log: LogConfig,
    pub(crate) log_path: PathBuf,
    /// The system-call filter to put on, compiled; none if libcontainer does it, or if none is wanted.
    pub(crate) filter: Option<PathBuf>,
    /// The cgroup file that counts kills for want of memory.
    pub(crate) oom_file: PathBuf,
}

/// What the shim answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ShimAnswer {
    Started { pid: i32 },
    Failed { reason: String },
}

/// `skep shim DIR`; returns only on failure.
pub fn shim_main(dir: &Path) -> i32 {
    let reason = match start(dir) {
        Ok(never) => match never {},
        Err(reason) => reason,
    };
    answer(&ShimAnswer::Failed { reason });
    1
}

fn answer(answer: &ShimAnswer) {
    let mut line = serde_json::to_vec(answer).expect("an answer is always JSON");
    line.push(b'\n');
    // The daemon may have died meanwhile; it looks at the state when it comes back.
    let _ = io::stdout().write_all(&line);
}

fn start(dir: &Path) -> Result<std::convert::Infallible, String> {
    let config: ShimConfig = read_json(&dir.join("shim.json"))?;
    // Out of the daemon's session; not possible, and not needed, if already leading one.
    let _ = setsid();
    let text = |error: nix::Error| error.to_string();
    let (out_read, out_write) = pipe().map_err(text)?;
    let (err_read, err_write) = pipe().map_err(text)?;
    for fd in [&out_read, &err_read] {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(text)?;
    }
    let null = fs::File::open("/dev/null").map_err(|error| error.to_string())?;
    let pid = make_container(&config, null.into(), out_write, err_write)?;
    answer(&ShimAnswer::Started { pid: pid.as_raw() });
    for fd in [&out_read, &err_read] {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(text)?;
    }
    become_watcher(dir, pid, &out_read, &err_read)
}

fn make_container(config: &ShimConfig, stdin: OwnedFd, out: OwnedFd, err: OwnedFd) -> Result<Pid, String> {
    let fail = |error: libcontainer::error::LibcontainerError| with_causes(&error);
    let mut container = ContainerBuilder::new(config.id.clone(), SyscallType::default())
        .with_root_path(&config.root)
        .map_err(fail)?
        .with_stdin(stdin)
        .with_stdout(out)
        .with_stderr(err)
        .with_executor(FilteredExecutor::new(config.filter.as_deref())?)
        .as_init(&config.bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(fail)?;
    if let Err(error) = container.start() {
        let reason = with_causes(&error);
        // Nothing of a container that never ran is of use.
        let _ = container.delete(true);
        return Err(reason);
    }
    container.pid().map(|pid| Pid::from_raw(pid.as_raw())).ok_or_else(|| "the container has no process".to_owned())
}

fn become_watcher(dir: &Path, pid: Pid, out: &OwnedFd, err: &OwnedFd) -> Result<std::convert::Infallible, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let null = fs::OpenOptions::new().write(true).open("/dev/null").map_err(|error| text(&error))?;
    nix::unistd::dup2_stdout(&null).map_err(|error| text(&error))?;
    let args = [
        "skep-shim".to_owned(),
        "shim-watch".to_owned(),
        dir.display().to_string(),
        pid.to_string(),
        out.as_raw_fd().to_string(),
        err.as_raw_fd().to_string(),
    ];
    let args: Vec<CString> = args.into_iter().map(|arg| CString::new(arg).expect("no NUL in a path")).collect();
    nix::unistd::execv(c"/proc/self/exe", &args).map_err(|error| text(&error))
}

/// `skep shim-watch DIR PID OUT ERR`.
pub fn watch_main(dir: &Path, pid: i32, out: i32, err: i32) -> i32 {
    match watch(dir, Pid::from_raw(pid), sys::inherited_fd(out), sys::inherited_fd(err)) {
        Ok(()) => 0,
        Err(error) => {
            // The last place where it can be said.
            let _ = fs::write(dir.join("shim-error"), error.to_string());
            1
        }
    }
}

fn watch(dir: &Path, pid: Pid, out: OwnedFd, err: OwnedFd) -> io::Result<()> {
    let config: ShimConfig = read_json(&dir.join("shim.json")).map_err(io::Error::other)?;
    let mut writer = match config.log.driver {
        LogDriver::JsonFile => Some(LogWriter::open(&config.log_path, config.log)?),
        LogDriver::None => None,
    };
    let ended = sys::pidfd_open(pid.as_raw())?;
    // From here on it mostly sleeps; that it sleeps in less memory is no condition for it.
    let _ = sys::let_go_of_code();
    let mut pipes = [Some((Stream::Stdout, out)), Some((Stream::Stderr, err))];
    let mut running = true;
    while running || pipes.iter().any(Option::is_some) {
        let mut polled: Vec<PollFd<'_>> = Vec::with_capacity(3);
        let order: Vec<usize> = (0..pipes.len()).filter(|&slot| pipes[slot].is_some()).collect();
        for (_, fd) in pipes.iter().flatten() {
            polled.push(PollFd::new(std::os::fd::AsFd::as_fd(fd), PollFlags::POLLIN));
        }
        if running {
            polled.push(PollFd::new(std::os::fd::AsFd::as_fd(&ended), PollFlags::POLLIN));
        }
        // Once the first process is gone, what others still hold open gets one more second.
        let limit = if running { PollTimeout::NONE } else { PollTimeout::from(1000u16) };
        match poll(&mut polled, limit) {
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(0) => break,
            Ok(_) => {}
        }
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        for (&slot, _) in order.iter().zip(&ready).filter(|(_, ready)| **ready) {
            copy_output(&mut pipes[slot], writer.as_mut());
        }
        if running && ready.last() == Some(&true) {
            running = false;
        }
    }
    if let Some(writer) = &mut writer {
        // A full disk must not keep the exit code from being told.
        let _ = writer.finish(now());
    }
    let record =
        ExitRecord { code: exit_code(pid)?, at_nanos: now().as_nanos(), oom_killed: oom_killed(&config.oom_file) };
    disk::write_whole(&dir.join("exit.json"), &serde_json::to_vec(&record)?)
}

/// Copies what one pipe has; closes it at its end.
fn copy_output(pipe: &mut Option<(Stream, OwnedFd)>, writer: Option<&mut LogWriter>) {
    let Some((stream, fd)) = pipe else { return };
    let mut buffer = [0; 16 << 10];
    match read(&*fd, &mut buffer) {
        Ok(0) => *pipe = None,
        Ok(len) => {
            if let Some(writer) = writer {
                // With a full disk output is lost rather than the container stalled.
                let _ = writer.write(*stream, &buffer[..len], now());
            }
        }
        Err(nix::Error::EINTR | nix::Error::EAGAIN) => {}
        Err(_) => *pipe = None,
    }
}

fn exit_code(pid: Pid) -> io::Result<i32> {
    loop {
        match waitpid(pid, None::<WaitPidFlag>) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Both cgroup versions count kills in a line `oom_kill N`.
fn oom_killed(path: &Path) -> bool {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0")
}

fn now() -> Timestamp {
    Timestamp::from_system(SystemTime::now())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, String> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// What an exec runs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecConfig {
    pub(crate) id: String,
    pub(crate) root: PathBuf,
    /// The OCI runtime-spec's `process`.
    pub(crate) process_path: PathBuf,
    /// As [`ShimConfig::filter`].
    pub(crate) filter: Option<PathBuf>,
    /// After this the process is killed.
    pub(crate) limit: Duration,
}

/// `skep shim-exec FILE`: runs one more process in a container and exits as it does. Its output is
/// this process's own.
pub fn exec_main(path: &Path) -> i32 {
    match exec(path) {
        Ok(code) => code,
        Err(reason) => {
            let _ = writeln!(io::stderr(), "{reason}");
            126
        }
    }
}

fn exec(path: &Path) -> Result<i32, String> {
    let config: ExecConfig = read_json(path)?;
    let pid = ContainerBuilder::new(config.id, SyscallType::default())
        .with_root_path(config.root)
        .map_err(|error| with_causes(&error))?
        .with_executor(FilteredExecutor::new(config.filter.as_deref())?)
        .as_tenant()
        .with_detach(true)
        .with_process(Some(config.process_path))
        .build()
        .map_err(|error| with_causes(&error))?;
    let pid = Pid::from_raw(pid.as_raw());
    let ended = sys::pidfd_open(pid.as_raw()).map_err(|error| error.to_string())?;
    let limit = PollTimeout::try_from(config.limit).unwrap_or(PollTimeout::MAX);
    let waited = poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&ended), PollFlags::POLLIN)], limit);
    if waited == Ok(0) {
        sys::pidfd_signal(&ended, libc::SIGKILL).map_err(|error| error.to_string())?;
    }
    exit_code(pid).map_err(|error| error.to_string())
}
