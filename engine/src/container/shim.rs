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
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2, setsid};
use serde::{Deserialize, Serialize};
use skep_api::with_causes;

use crate::container::logs::LogWriter;
use crate::container::logs::config::LogConfig;
use crate::container::logs::forward::LogSubject;
use crate::container::runtime::{self, ExternalRuntime, Runner};
use crate::container::starter::{Descent, Starter};
use crate::container::state::ExitRecord;
use crate::container::streams::{Endpoints, Streams, now};
use crate::engine::EXIT;
use crate::{disk, sys};

/// What the daemon tells the shim.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ShimConfig {
    pub(crate) id: String,
    /// libcontainer's state of all containers.
    pub(crate) root: PathBuf,
    /// Where `config.json` lies.
    pub(crate) bundle: PathBuf,
    /// None: this program makes the container itself.
    #[serde(default)]
    pub(crate) runtime: Option<ExternalRuntime>,
    pub(crate) log: LogConfig,
    pub(crate) log_path: PathBuf,
    #[serde(default)]
    pub(crate) log_subject: LogSubject,
    /// What does not outlive a start of the host.
    #[serde(default)]
    pub(crate) run_dir: PathBuf,
    #[serde(default = "without_input")]
    pub(crate) stdio: Stdio,
    /// The system-call filter to put on, compiled; none if libcontainer does it, or if none is wanted.
    pub(crate) filter: Option<PathBuf>,
    #[serde(default)]
    pub(crate) descent: Option<Descent>,
    /// The cgroup file that counts kills for want of memory.
    pub(crate) oom_file: PathBuf,
}

/// How a container was made by a version that knew nothing else.
fn without_input() -> Stdio {
    Stdio::Pipes { open_stdin: false }
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
    let plumbing = Plumbing::new(config.stdio, dir)?;
    sys::end_by_broken_pipes(true);
    let made = match &config.runtime {
        None => make_container(&config, &plumbing),
        Some(runtime) => {
            let runner = Runner { runtime, root: &config.root };
            adopt_orphans()
                .and_then(|()| runner.run(&config.id, &config.bundle, dir, &plumbing.streams()))
                .map(Pid::from_raw)
        }
    };
    sys::end_by_broken_pipes(false);
    let pid = made?;
    let endpoints = plumbing.finish()?;
    answer(&ShimAnswer::Started { pid: pid.as_raw() });
    become_watcher(dir, pid, &endpoints)
}

/// The file beside `config.json` that says why mounts could not be made.
pub(crate) const COMPLAINTS: &str = "complaints";

/// How a process's standard streams are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Stdio {
    /// Two pipes, and one for input if it is `open`.
    Pipes { open_stdin: bool },
    /// All three are one terminal.
    Terminal,
}

/// Both ends of a process's standard streams, until it has its own.
enum Plumbing {
    Pipes {
        ours: Endpoints,
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// The runtime makes the terminal inside the container and hands us its other side.
    Terminal {
        listener: UnixListener,
        path: PathBuf,
        /// Where the path's last part lies.
        dir: fs::File,
    },
}

impl Plumbing {
    fn new(stdio: Stdio, dir: &Path) -> Result<Self, String> {
        let text = |error: nix::Error| error.to_string();
        if stdio == Stdio::Terminal {
            let path = dir.join("console.sock");
            let listener = sys::listen(&path).map_err(|error| format!("the terminal's socket: {error}"))?;
            let dir = fs::File::open(dir).map_err(|error| format!("the terminal's directory: {error}"))?;
            return Ok(Self::Terminal { listener, path, dir });
        }
        let (out_read, stdout) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
        let (err_read, stderr) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
        let (stdin, input) = if stdio == (Stdio::Pipes { open_stdin: true }) {
            let (stdin, input) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
            (stdin, Some(input))
        } else {
            (fs::File::open("/dev/null").map_err(|error| error.to_string())?.into(), None)
        };
        let ours = Endpoints { outputs: [Some(out_read), Some(err_read)], input, terminal: false };
        Ok(Self::Pipes { ours, stdin, stdout, stderr })
    }

    /// Gives a container, or one more process in one, its ends.
    fn connect(&self, builder: ContainerBuilder) -> Result<ContainerBuilder, String> {
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|error| error.to_string());
        Ok(match self {
            Self::Pipes { stdin, stdout, stderr, .. } => {
                builder.with_stdin(copy(stdin)?).with_stdout(copy(stdout)?).with_stderr(copy(stderr)?)
            }
            Self::Terminal { path, .. } => builder.with_console_socket(Some(path)),
        })
    }

    /// The process's ends, as another runtime takes them.
    fn streams(&self) -> runtime::Streams<'_> {
        match self {
            Self::Pipes { stdin, stdout, stderr, .. } => runtime::Streams::Pipes([stdin, stdout, stderr]),
            // By a way that is short enough for a socket's address, wherever the directory lies.
            Self::Terminal { path, dir, .. } => {
                let here = format!("/proc/{}/fd/{}", std::process::id(), dir.as_raw_fd());
                runtime::Streams::Terminal(Path::new(&here).join(path.file_name().unwrap_or_default()))
            }
        }
    }

    /// Our ends, once the process has its own.
    fn finish(self) -> Result<Endpoints, String> {
        match self {
            Self::Pipes { ours, .. } => Ok(ours),
            Self::Terminal { listener, path, .. } => {
                let text = |error: io::Error| format!("the terminal did not come: {error}");
                let (socket, _) = listener.accept().map_err(text)?;
                let terminal = sys::receive_fd(&socket).map_err(text)?;
                // It has done its work; the directory goes with the container at the latest.
                let _ = fs::remove_file(path);
                let input = Some(terminal.try_clone().map_err(text)?);
                Ok(Endpoints { outputs: [Some(terminal), None], input, terminal: true })
            }
        }
    }
}

/// Has what another runtime leaves behind become this process's children, the container's first process
/// above all.
fn adopt_orphans() -> Result<(), String> {
    nix::sys::prctl::set_child_subreaper(true).map_err(|error| error.to_string())
}

/// What our own part of making a container complained of, which says more than that it failed.
fn complaints(bundle: &Path) -> Option<String> {
    let path = bundle.join(COMPLAINTS);
    let told = fs::read_to_string(&path).ok()?;
    // Told once.
    drop(fs::remove_file(path));
    Some(told)
}

fn make_container(config: &ShimConfig, plumbing: &Plumbing) -> Result<Pid, String> {
    let fail = |error: libcontainer::error::LibcontainerError| with_causes(&error);
    let builder = ContainerBuilder::new(config.id.clone(), SyscallType::default())
        .with_root_path(&config.root)
        .map_err(fail)?
        .with_executor(Starter::new(config.filter.as_deref(), config.descent.clone())?);
    let mut container = plumbing
        .connect(builder)?
        .as_init(&config.bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(|error| complaints(&config.bundle).unwrap_or_else(|| fail(error)))?;
    if let Err(error) = container.start() {
        let reason = with_causes(&error);
        // Nothing of a container that never ran is of use.
        let _ = container.delete(true);
        return Err(reason);
    }
    container.pid().map(|pid| Pid::from_raw(pid.as_raw())).ok_or_else(|| "the container has no process".to_owned())
}

/// The socket where attached clients come in is this process's standard input, before and after.
fn become_watcher(dir: &Path, pid: Pid, endpoints: &Endpoints) -> Result<std::convert::Infallible, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let null = fs::OpenOptions::new().write(true).open("/dev/null").map_err(|error| text(&error))?;
    nix::unistd::dup2_stdout(&null).map_err(|error| text(&error))?;
    let mut args = vec!["skep-shim".to_owned(), "shim-watch".to_owned(), dir.display().to_string(), pid.to_string()];
    let [out, err] = &endpoints.outputs;
    for fd in [out, err, &endpoints.input] {
        if let Some(fd) = fd {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|error| text(&error))?;
        }
        args.push(fd.as_ref().map_or(-1, OwnedFd::as_raw_fd).to_string());
    }
    let args: Vec<CString> = args.into_iter().map(|arg| CString::new(arg).expect("no NUL in a path")).collect();
    nix::unistd::execv(c"/proc/self/exe", &args).map_err(|error| text(&error))
}

/// `skep shim-watch DIR PID OUT ERR IN`; -1 is none.
pub fn watch_main(dir: &Path, pid: i32, fds: [i32; 3]) -> i32 {
    let [out, err, input] = fds.map(|fd| (fd >= 0).then(|| sys::inherited_fd(fd)));
    match watch(dir, Pid::from_raw(pid), [out, err], input) {
        Ok(()) => 0,
        Err(error) => {
            // The last place where it can be said.
            let _ = fs::write(dir.join("shim-error"), error.to_string());
            1
        }
    }
}

fn watch(dir: &Path, pid: Pid, outputs: [Option<OwnedFd>; 2], input: Option<OwnedFd>) -> io::Result<()> {
    let config: ShimConfig = read_json(&dir.join("shim.json")).map_err(io::Error::other)?;
    let writer = LogWriter::open(&config.log_path, &config.log, &config.log_subject)?;
    let ended = sys::pidfd_open(pid.as_raw())?;
    let endpoints = Endpoints { outputs, input, terminal: config.stdio == Stdio::Terminal };
    let mut streams = Streams::new(endpoints, Some(sys::inherited_fd(0).into()), writer)?;
    // From here on it mostly sleeps; that it sleeps in less memory is no condition for it.
    let let_go = || drop(sys::let_go_of_code());
    let_go();
    streams.run(&ended, None, &|| (), &let_go)?;
    let record =
        ExitRecord { code: exit_code(pid)?, at_nanos: now().as_nanos(), oom_killed: oom_killed(&config.oom_file) };
    let bytes = serde_json::to_vec(&record)?;
    // Where the disk is full there is still room beside the sockets.
    disk::write_passing(&dir.join("exit.json"), &bytes)
        .or_else(|_| disk::write_passing(&config.run_dir.join("exit.json"), &bytes))
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

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, String> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// What an exec runs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecConfig {
    pub(crate) id: String,
    pub(crate) root: PathBuf,
    #[serde(default)]
    pub(crate) runtime: Option<ExternalRuntime>,
    /// The OCI runtime-spec's `process`.
    pub(crate) process_path: PathBuf,
    /// As [`ShimConfig::filter`].
    pub(crate) filter: Option<PathBuf>,
    #[serde(default)]
    pub(crate) descent: Option<Descent>,
    pub(crate) stdio: Stdio,
    /// After this the process is killed.
    pub(crate) limit: Option<Duration>,
}

/// `skep shim-exec DIR`: runs one more process in a container as `DIR/exec.json` says, tells its pid,
/// watches it, and exits as it does. Attached clients come in by the socket that is its standard input.
pub fn exec_main(dir: &Path) -> i32 {
    let started = exec(dir);
    match started {
        Ok((pid, endpoints, limit)) => {
            answer(&ShimAnswer::Started { pid: pid.as_raw() });
            let code = watch_exec(pid, endpoints, limit).unwrap_or(126);
            let record = ExitRecord { code, at_nanos: now().as_nanos(), oom_killed: false };
            // For a daemon that is not the one that waits; the code itself is told to that one.
            let _ = disk::write_passing(&dir.join(EXIT), &serde_json::to_vec(&record).unwrap_or_default());
            code
        }
        Err(reason) => {
            answer(&ShimAnswer::Failed { reason });
            126
        }
    }
}

fn exec(dir: &Path) -> Result<(Pid, Endpoints, Option<Duration>), String> {
    let config: ExecConfig = read_json(&dir.join("exec.json"))?;
    let plumbing = Plumbing::new(config.stdio, dir)?;
    sys::end_by_broken_pipes(true);
    let made = match &config.runtime {
        None => make_tenant(&config, &plumbing),
        Some(runtime) => {
            let runner = Runner { runtime, root: &config.root };
            adopt_orphans().and_then(|()| runner.exec(&config.id, &config.process_path, dir, &plumbing.streams()))
        }
    };
    sys::end_by_broken_pipes(false);
    Ok((Pid::from_raw(made?), plumbing.finish()?, config.limit))
}

fn make_tenant(config: &ExecConfig, plumbing: &Plumbing) -> Result<i32, String> {
    let builder = ContainerBuilder::new(config.id.clone(), SyscallType::default())
        .with_root_path(&config.root)
        .map_err(|error| with_causes(&error))?
        .with_executor(Starter::new(config.filter.as_deref(), config.descent.clone())?);
    let process = Some(config.process_path.clone());
    let builder = plumbing.connect(builder)?.as_tenant().with_detach(true).with_process(process);
    builder.build().map(|pid| pid.as_raw()).map_err(|error| with_causes(&error))
}

fn watch_exec(pid: Pid, endpoints: Endpoints, limit: Option<Duration>) -> io::Result<i32> {
    let ended = sys::pidfd_open(pid.as_raw())?;
    let mut streams = Streams::new(endpoints, Some(sys::inherited_fd(0).into()), None)?;
    // It may have ended by itself at that very moment.
    streams.run(&ended, limit, &|| drop(sys::pidfd_signal(&ended, libc::SIGKILL)), &|| ())?;
    exit_code(pid)
}
