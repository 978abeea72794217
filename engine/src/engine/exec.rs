//! More processes in running containers, each watched by a process of its own.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Child;
use tokio::sync::watch;

use super::attach::{Attachment, attach_at};
use super::launch::read_answer;
use super::lifecycle::{start_failure, start_ticks};
use super::{Container, Engine, EngineError, disk_error};
use crate::container::shim::{ExecConfig, ShimConfig, Stdio};
use crate::container::spec::{TERMINAL_GROUP, console_size};
use crate::container::starter::{Descent, WayIn};
use crate::container::state::{ContainerState, ExitRecord};
use crate::container::user;
use crate::{disk, sys};

/// How many execs of all containers are remembered; the oldest that have ended are forgotten.
const EXECS_MAX: usize = 4096;
/// What a command that was killed may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
const CODE_LOST: i32 = 255;
/// In an exec's directory.
const SOCKET: &str = "io.sock";
const RECORD: &str = "record.json";
pub(crate) const EXIT: &str = "exit.json";

/// A process to run in a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ExecSpec {
    pub command: Vec<String>,
    /// Added to the container's; `NAME=value`.
    pub env: Vec<String>,
    /// Empty: the container's.
    pub working_dir: String,
    /// `user[:group]`; empty: the container's.
    pub user: String,
    pub tty: bool,
    /// What ends a client's connection but not the process, as bytes; for terminals.
    pub detach_keys: Vec<u8>,
    pub open_stdin: bool,
    pub privileged: bool,
    /// Rows and columns that a terminal begins with.
    pub terminal_size: Option<[u16; 2]>,
}

/// Where an exec stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecState {
    Created,
    Running {
        pid: i32,
    },
    /// `pid` is what it had, 0 if it never ran.
    Exited {
        code: i32,
        pid: i32,
    },
}

/// One exec.
#[derive(Clone, Debug)]
pub struct Exec {
    pub id: String,
    pub container: String,
    pub spec: ExecSpec,
    state: watch::Sender<ExecState>,
    socket: PathBuf,
}

impl Exec {
    #[must_use]
    pub fn state(&self) -> ExecState {
        *self.state.borrow()
    }
}

/// An exec that runs, as the next daemon finds it.
#[derive(Debug, Serialize, Deserialize)]
struct ExecRecord {
    id: String,
    spec: ExecSpec,
    pid: i32,
    /// The process that watches it.
    watcher: i32,
    watcher_ticks: u64,
}

/// The execs of one engine, in the order they were made.
#[derive(Debug, Default)]
pub(crate) struct ExecStore {
    execs: Mutex<(u64, BTreeMap<u64, Arc<Exec>>)>,
}

impl ExecStore {
    fn insert(&self, exec: Arc<Exec>) {
        let mut execs = self.execs.lock().expect("nobody panics while holding it");
        let (next, all) = &mut *execs;
        if all.len() >= EXECS_MAX {
            let ended = all.iter().find(|(_, exec)| matches!(exec.state(), ExecState::Exited { .. }));
            let oldest = ended.or_else(|| all.iter().next()).map(|(&number, _)| number);
            all.retain(|&number, _| Some(number) != oldest);
        }
        all.insert(*next, exec);
        *next += 1;
    }

    fn find(&self, id: &str) -> Option<Arc<Exec>> {
        let execs = self.execs.lock().expect("nobody panics while holding it");
        let mut matching = execs.1.values().filter(|exec| id.len() >= 4 && exec.id.starts_with(id));
        matching.next().filter(|_| matching.next().is_none()).cloned()
    }

    /// The ids of a container's execs that run.
    pub(super) fn of_container(&self, container: &str) -> Vec<String> {
        let execs = self.execs.lock().expect("nobody panics while holding it");
        let running =
            |exec: &&Arc<Exec>| exec.container == container && matches!(exec.state(), ExecState::Running { .. });
        execs.1.values().filter(running).map(|exec| exec.id.clone()).collect()
    }

    pub(super) fn forget_container(&self, container: &str) {
        let mut execs = self.execs.lock().expect("nobody panics while holding it");
        execs.1.retain(|_, exec| exec.container != container);
    }

    /// Forgets those that a container, which has ended, will not run any more.
    pub(super) fn forget_unstarted(&self, container: &str) {
        let mut execs = self.execs.lock().expect("nobody panics while holding it");
        execs.1.retain(|_, exec| exec.container != container || exec.state() != ExecState::Created);
    }
}

impl Engine {
    /// Says what is to run in a container; [`start_exec`](Self::start_exec) runs it.
    pub fn create_exec(&self, name: &str, spec: ExecSpec) -> Result<String, EngineError> {
        let container = self.find(name)?;
        container.require_unpaused(name)?;
        if spec.command.is_empty() {
            return Err(EngineError::Invalid("No exec command specified: name the program to run".into()));
        }
        let id = hex::encode(rand::random::<[u8; 32]>());
        let action = format!("exec_create: {}", spec.command.join(" "));
        self.tell_container(&container, &action, &[("execID", id.clone())]);
        self.execs.insert(Arc::new(Exec {
            // A short name: it is part of a socket's.
            socket: container.dirs.run.join(format!("exec-{}", &id[..16])).join(SOCKET),
            id: id.clone(),
            container: container.id.clone(),
            spec,
            state: watch::channel(ExecState::Created).0,
        }));
        Ok(id)
    }

    pub fn exec(&self, id: &str) -> Result<Arc<Exec>, EngineError> {
        self.execs.find(id).ok_or_else(|| EngineError::NoExec(id.to_owned()))
    }

    /// Says why an exec cannot be started, if it cannot.
    pub fn require_startable(&self, exec: &Exec) -> Result<(), EngineError> {
        self.find(&exec.container)?.require_unpaused(&exec.container)?;
        if exec.state() == ExecState::Created {
            return Ok(());
        }
        Err(EngineError::Conflict(format!("exec {} has run already: create another", exec.id)))
    }

    /// Starts an exec; attached to it from its first word on. Its terminal has `size` (rows and columns), or that with
    /// which it was made.
    pub async fn start_exec(self: &Arc<Self>, id: &str, size: Option<[u16; 2]>) -> Result<Attachment, EngineError> {
        let exec = self.exec(id)?;
        self.require_startable(&exec)?;
        let container = self.find(&exec.container)?;
        let action = format!("exec_start: {}", exec.spec.command.join(" "));
        self.tell_container(&container, &action, &[("execID", exec.id.clone())]);
        let spec = ExecSpec { terminal_size: size.or(exec.spec.terminal_size), ..exec.spec.clone() };
        let started = self.run_exec(&container, &spec, &exec.socket, None).await;
        let (attachment, pid, mut child) = match started {
            Ok(started) => started,
            Err(error) => {
                let (code, reason) = start_failure(&error, exec.spec.command.first());
                exec.state.send_replace(ExecState::Exited { code, pid: 0 });
                return Err(EngineError::Start { id: container.id.clone(), reason });
            }
        };
        exec.state.send_replace(ExecState::Running { pid });
        note(&exec, pid, &child);
        let engine = Arc::clone(self);
        self.tasks.spawn(async move {
            let code = child.wait().await.ok().and_then(|status| status.code()).unwrap_or(CODE_LOST);
            engine.end_exec(&container, &exec, code);
        });
        Ok(attachment)
    }

    fn end_exec(&self, container: &Container, exec: &Exec, code: i32) {
        exec.state.send_modify(|state| {
            let pid = if let ExecState::Running { pid } = *state { pid } else { 0 };
            *state = ExecState::Exited { code, pid };
        });
        remove_dir(&exec.socket);
        let told = [("execID", exec.id.clone()), ("exitCode", code.to_string())];
        self.tell_container(container, "exec_die", &told);
    }

    /// Takes up a container's execs that an earlier daemon started, running or ended since.
    pub(super) fn adopt_execs(self: &Arc<Self>, container: &Arc<Container>) {
        for entry in fs::read_dir(&container.dirs.run).into_iter().flatten().flatten() {
            // Health checks have no record, and nobody who asks for them.
            let Ok(record) = read_json::<ExecRecord>(&entry.path().join(RECORD)) else { continue };
            let exec = Arc::new(Exec {
                id: record.id,
                container: container.id.clone(),
                spec: record.spec,
                state: watch::channel(ExecState::Running { pid: record.pid }).0,
                socket: entry.path().join(SOCKET),
            });
            self.execs.insert(exec.clone());
            let (engine, container) = (Arc::clone(self), container.clone());
            self.tasks.spawn(async move {
                if let Err(error) = ended(record.watcher, record.watcher_ticks).await {
                    tracing::warn!(exec = %exec.id, %error, "the end of an exec cannot be waited for");
                }
                let exit = read_json::<ExitRecord>(&exec.socket.with_file_name(EXIT));
                engine.end_exec(&container, &exec, exit.map_or(CODE_LOST, |exit| exit.code));
            });
        }
    }

    /// Waits until an exec has ended; returns its exit code.
    pub async fn wait_exec(&self, id: &str) -> Result<i32, EngineError> {
        let mut state = self.exec(id)?.state.subscribe();
        let ended = state.wait_for(|state| matches!(state, ExecState::Exited { .. })).await;
        Ok(match ended.as_deref() {
            Ok(ExecState::Exited { code, .. }) => *code,
            Ok(ExecState::Created | ExecState::Running { .. }) | Err(_) => CODE_LOST,
        })
    }

    /// Tells an exec's terminal how large it is shown.
    pub async fn resize_exec(&self, id: &str, rows: u16, columns: u16) -> Result<(), EngineError> {
        let exec = self.exec(id)?;
        let doing = format!("resizing the terminal of exec {id}");
        match attach_at(&exec.socket) {
            Ok(mut attachment) => attachment.input.resize(rows, columns).await.map_err(disk_error(doing)),
            Err(error) => Err(disk_error(doing)(error)),
        }
    }

    /// Runs a command in a running container to its end, or to `limit`; returns its exit code and the
    /// first `output_len_max` bytes of its output.
    pub(super) async fn run_command(
        &self,
        container: &Container,
        command: &[String],
        limit: Duration,
        output_len_max: usize,
    ) -> Result<(i32, String), EngineError> {
        container.require_unpaused(&container.id)?;
        let doing = format!("running a command in container {}", container.id);
        let spec = ExecSpec { command: command.to_vec(), ..ExecSpec::default() };
        let socket = container.dirs.run.join(format!("exec-{:016x}", rand::random::<u64>())).join(SOCKET);
        let started = self.run_exec(container, &spec, &socket, Some(limit)).await;
        let result = match started {
            Ok((mut attachment, _, mut child)) => {
                let mut output = Vec::new();
                while let Some((_, bytes)) = attachment.output.next().await {
                    let room = output_len_max - output.len();
                    output.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                // The command's own limit is kept by the process that watches it.
                let status = tokio::time::timeout(KILL_LIMIT, child.wait()).await;
                status
                    .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the command did not end"))
                    .flatten()
                    .map(|status| (status.code().unwrap_or(CODE_LOST), String::from_utf8_lossy(&output).into_owned()))
            }
            Err(error) => Err(error),
        };
        remove_dir(&socket);
        result.map_err(disk_error(doing))
    }

    /// Starts the process that starts and watches the exec.
    async fn run_exec(
        &self,
        container: &Container,
        spec: &ExecSpec,
        socket: &Path,
        limit: Option<Duration>,
    ) -> io::Result<(Attachment, i32, Child)> {
        let dir = socket.parent().ok_or_else(|| io::Error::other("an exec has its directory"))?;
        fs::create_dir_all(dir)?;
        let process_path = dir.join("process.json");
        let (process, descent) = process(container, spec)?;
        disk::write_passing(&process_path, process.to_string().as_bytes())?;
        let config = ExecConfig {
            id: container.id.clone(),
            root: self.runtime_root(container.config().runtime.as_ref()),
            runtime: container.config().runtime.clone(),
            process_path,
            filter: if spec.privileged { None } else { self.filter(&container.config())? },
            descent,
            stdio: if spec.tty { Stdio::Terminal } else { Stdio::Pipes { open_stdin: spec.open_stdin } },
            limit,
        };
        disk::write_passing(&dir.join("exec.json"), &serde_json::to_vec(&config)?)?;
        let listener = sys::listen(socket)?;
        let attachment = attach_at(socket)?;
        let mut child = self.shim("shim-exec", dir, listener.into())?;
        match read_answer(&mut child).await {
            Ok(pid) => Ok((attachment, pid, child)),
            Err(error) => {
                drop(child.wait().await);
                remove_dir(socket);
                Err(error)
            }
        }
    }
}

/// Writes down what the next daemon needs to take an exec up.
fn note(exec: &Exec, pid: i32, child: &Child) {
    let watcher = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
    let watcher_ticks = start_ticks(watcher).unwrap_or(0);
    let record = ExecRecord { id: exec.id.clone(), spec: exec.spec.clone(), pid, watcher, watcher_ticks };
    let noted = serde_json::to_vec(&record).map_err(io::Error::other);
    let noted = noted.and_then(|bytes| disk::write_passing(&exec.socket.with_file_name(RECORD), &bytes));
    if let Err(error) = noted {
        tracing::warn!(exec = %exec.id, %error, "an exec could not be written down: it is lost with this daemon");
    }
}

/// Waits until a process has ended, unless its number is another one's by now.
async fn ended(pid: i32, ticks: u64) -> io::Result<()> {
    let Ok(process) = sys::pidfd_open(pid) else { return Ok(()) };
    if start_ticks(pid) == Some(ticks) {
        drop(sys::watch_fd(process)?.readable().await?);
    }
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// An exec's directory is of no use after its end, and gone with the container at the latest.
fn remove_dir(socket: &Path) {
    if let Some(dir) = socket.parent() {
        let _ = fs::remove_dir_all(dir);
    }
}

/// The runtime-spec's `process`: the container's own, but for what the exec says; and how it comes to its user.
fn process(container: &Container, spec: &ExecSpec) -> io::Result<(serde_json::Value, Option<Descent>)> {
    let whole: serde_json::Value = serde_json::from_slice(&fs::read(container.dirs.data.join("config.json"))?)?;
    let mut process = whole["process"].clone();
    let shim: ShimConfig = serde_json::from_slice(&fs::read(container.dirs.data.join("shim.json"))?)?;
    if let Some(descent) = &shim.descent {
        descent.give_back(&mut process);
    }
    process["args"] = spec.command.clone().into();
    process["terminal"] = spec.tty.into();
    process["consoleSize"] = spec.terminal_size.filter(|_| spec.tty).map(console_size).into();
    if let Some(env) = process["env"].as_array_mut() {
        let name_of = |text: &str| text.split('=').next().unwrap_or_default().to_owned();
        let mut given = spec.env.clone();
        if spec.tty && !given.iter().any(|var| name_of(var) == "TERM") {
            given.push("TERM=xterm".into());
        }
        let is_own = |name: &str| container.config().env.iter().any(|var| name_of(var) == name);
        if !spec.tty && !is_own("TERM") {
            // The terminal was the first process's.
            env.retain(|var| var.as_str().map(name_of).as_deref() != Some("TERM"));
        }
        env.retain(|var| !given.iter().any(|given| var.as_str().map(name_of) == Some(name_of(given))));
        env.extend(given.into_iter().map(Into::into));
    }
    if !spec.working_dir.is_empty() {
        process["cwd"] = spec.working_dir.clone().into();
    }
    if !spec.user.is_empty() {
        let config = container.config();
        let user = user::resolve(&container.dirs.rootfs(), &spec.user, &config.groups).map_err(io::Error::other)?;
        process["user"]["uid"] = user.uid.into();
        process["user"]["gid"] = user.gid.into();
        process["user"]["additionalGids"] = user.groups.into();
        let bounding = process["capabilities"]["bounding"].clone();
        for set in ["effective", "permitted"] {
            process["capabilities"][set] = if user.uid == 0 { bounding.clone() } else { serde_json::json!([]) };
        }
        if let Some(env) = process["env"].as_array_mut() {
            env.retain(|var| !var.as_str().is_some_and(|var| var.starts_with("HOME=")));
            env.push(format!("HOME={}", user.home).into());
        }
    }
    if spec.privileged {
        let all = crate::container::spec::all_capabilities();
        for set in ["bounding", "effective", "permitted"] {
            process["capabilities"][set] = serde_json::json!(all);
        }
        process["noNewPrivileges"] = serde_json::Value::Null;
        process["apparmorProfile"] = serde_json::Value::Null;
    }
    let descent = match (&container.dirs.shift, shim.descent) {
        (Some(shift), Some(descent)) => {
            let way_in = WayIn { namespace: shift.user_namespace(), terminal: shift.host_ids(0, TERMINAL_GROUP)? };
            Some(descent.of_process(&mut process, way_in))
        }
        _ => None,
    };
    Ok((process, descent))
}

impl Container {
    pub(super) fn require_running(&self) -> Result<(), EngineError> {
        match &*self.state.borrow() {
            ContainerState::Running(_) => Ok(()),
            other @ (ContainerState::Created | ContainerState::Restarting(_) | ContainerState::Exited(_)) => {
                Err(EngineError::WrongState { id: self.id.clone(), found: other.as_str(), wanted: "running" })
            }
        }
    }

    /// `named` is what whoever asks calls it.
    fn require_unpaused(&self, named: &str) -> Result<(), EngineError> {
        self.require_running()?;
        match &*self.state.borrow() {
            ContainerState::Running(running) if running.paused => {
                Err(EngineError::Conflict(format!("Container {named} is paused, unpause the container before exec")))
            }
            ContainerState::Running(_)
            | ContainerState::Created
            | ContainerState::Restarting(_)
            | ContainerState::Exited(_) => Ok(()),
        }
    }
}
