//! One host of a rig.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::rig::{enter, signal_all};
use crate::{Api, LIMIT, processes, wait_until};

const START_LIMIT: Duration = Duration::from_secs(20);
const LOG_LINES_TOLD: usize = 60;
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Each host has a loopback of its own.
const METRICS: &str = "127.0.0.1:9323";

/// Of the package faketime; the loader puts in where the host's libraries are.
const FAKETIME: &str = "/usr/$LIB/faketime/libfaketimeMT.so.1";

/// Where a host stands.
pub(crate) struct Placing {
    pub(crate) name: String,
    pub(crate) addr: String,
    pub(crate) port: String,
    pub(crate) switch: u32,
    pub(crate) dir: PathBuf,
    pub(crate) cgroup: String,
    pub(crate) program: PathBuf,
}

/// A host: namespaces, an address, and a daemon that can be started and ended.
pub struct Host {
    placing: Placing,
    holder: Child,
    daemon: Mutex<Option<Child>>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("name", &self.placing.name).finish_non_exhaustive()
    }
}

/// What a command came to.
#[derive(Clone, Debug)]
pub struct Ran {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Host {
    pub(crate) fn new(placing: Placing, holder: Child) -> Self {
        fs::create_dir_all(&placing.dir).expect("a directory can be made");
        Self { placing, holder, daemon: Mutex::new(None) }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.placing.name
    }

    #[must_use]
    pub fn addr(&self) -> &str {
        &self.placing.addr
    }

    /// The daemon's data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.placing.dir.join("data")
    }

    /// The API's socket, as `-H` takes it.
    #[must_use]
    pub fn socket(&self) -> String {
        format!("unix://{}", self.placing.dir.join("skep.sock").display())
    }

    /// A connection to the daemon's API.
    #[must_use]
    pub fn api(&self) -> Api {
        Api::checking(&self.placing.dir.join("skep.sock")).expect("the daemon runs")
    }

    /// A process whose namespaces are the host's.
    #[must_use]
    pub fn holder_pid(&self) -> u32 {
        self.holder.id()
    }

    /// What the daemon has written to its log.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.placing.dir.join("log")).unwrap_or_default()
    }

    /// Shows the end of the daemon's log, for whoever reads of a failed test.
    pub(crate) fn tell_log(&self) {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let end = &lines[lines.len().saturating_sub(LOG_LINES_TOLD)..];
        eprintln!("--- the end of {}'s log:\n{}", self.name(), end.join("\n"));
    }

    /// A command inside the host's namespaces.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.holder.id().to_string(), "-n", "-m", "-u"]).arg(program);
        command
    }

    /// Starts the daemon and waits until it answers.
    pub fn start_daemon(&self) {
        self.start_daemon_with(&[]);
    }

    /// The same, with further flags.
    pub fn start_daemon_with(&self, flags: &[&str]) {
        self.spawn_daemon_with(flags);
        wait_until("the daemon answers", START_LIMIT, || (self.run(&["version"]).success, self.log()));
    }

    /// Starts the daemon without waiting for anything.
    pub fn spawn_daemon(&self) {
        self.spawn_daemon_with(&[]);
    }

    /// The same, with further flags.
    pub fn spawn_daemon_with(&self, flags: &[&str]) {
        let dir = &self.placing.dir;
        let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).expect("a log can be made");
        let mut daemon = self.command(&self.placing.program);
        if self.clock_file().exists() {
            daemon
                .env("LD_PRELOAD", FAKETIME)
                .env("FAKETIME_TIMESTAMP_FILE", self.clock_file())
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
                .env("NO_FAKE_STAT", "1");
        }
        let child = daemon
            .args(["daemon", "--log-level", "info", "--host", &self.socket()])
            .args(["--cgroup-parent", &self.placing.cgroup])
            .args(["--insecure-registry", "10.77.0.1:5000", "--metrics-addr", METRICS])
            .arg("--data-root")
            .arg(self.data())
            .arg("--exec-root")
            .arg(dir.join("run"))
            .args(["--config-file", "/dev/stdin"])
            .args(flags)
            .args(std::env::var("SKEP_DAEMON_FLAGS").unwrap_or_default().split_whitespace())
            .env("SKEP_SNAPSHOT_INTERVAL", std::env::var("SKEP_SNAPSHOT_INTERVAL").unwrap_or_else(|_| "200".into()))
            .stdin(empty_config())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("nsenter runs (package util-linux)");
        *self.daemon.lock().expect("no test panics while holding it") = Some(child);
    }

    /// The daemon's own processes (not its shims).
    /// The daemon that runs here.
    #[track_caller]
    #[must_use]
    pub fn daemon_pid(&self) -> i32 {
        self.daemon_pids().first().expect("the daemon runs").as_raw()
    }

    fn daemon_pids(&self) -> Vec<Pid> {
        let pids = processes::naming(&self.data());
        let is_daemon = |pid: &Pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).any(|word| word == b"daemon")
        };
        pids.into_iter().filter(is_daemon).collect()
    }

    /// `kill -9` of the daemon; containers go on.
    pub fn kill_daemon(&self) {
        signal_all(&self.daemon_pids(), Signal::SIGKILL);
        self.reap();
    }

    /// Stops the daemon cleanly.
    pub fn stop_daemon(&self) {
        signal_all(&self.daemon_pids(), Signal::SIGTERM);
        wait_until("the daemon stops", STOP_LIMIT, || {
            let pids = self.daemon_pids();
            (pids.is_empty() || self.has_exited(), format!("{pids:?}\n{}", self.log()))
        });
        self.reap();
    }

    fn has_exited(&self) -> bool {
        let mut daemon = self.daemon.lock().expect("no test panics while holding it");
        daemon.as_mut().is_none_or(|child| matches!(child.try_wait(), Ok(Some(_))))
    }

    fn reap(&self) {
        if let Some(mut child) = self.daemon.lock().expect("no test panics while holding it").take() {
            // It was just ended.
            let _ = child.wait();
        }
    }

    /// Waits until a daemon that cannot run has given up.
    pub fn wait_daemon_failed(&self) {
        wait_until("the daemon gives up", START_LIMIT, || (self.has_exited(), self.log()));
    }

    /// Holds the daemon still, or lets it go on.
    pub fn pause_daemon(&self, paused: bool) {
        let signal = if paused { Signal::SIGSTOP } else { Signal::SIGCONT };
        signal_all(&self.daemon_pids(), signal);
    }

    /// Takes the host off the network, or puts it back.
    pub fn cut(&self, cut: bool) {
        enter(self.placing.switch, &["ip", "link", "set", &self.placing.port, if cut { "down" } else { "up" }]);
    }

    /// Lets the host's link carry no more than `rate`, such as `2mbit`, in either direction; `None` takes that back.
    pub fn slow(&self, rate: Option<&str>) {
        let limit = |rate: &'_ str| ["rate", rate, "burst", "16k", "latency", "200ms"].map(str::to_owned);
        let set = |pid: u32, link: &str| {
            let words = ["tc", "qdisc", if rate.is_some() { "replace" } else { "del" }, "dev", link, "root"];
            let limit = rate.map(limit).into_iter().flatten();
            let command: Vec<String> =
                words.map(str::to_owned).into_iter().chain(rate.map(|_| "tbf".to_owned())).chain(limit).collect();
            enter(pid, &command.iter().map(String::as_str).collect::<Vec<_>>());
        };
        set(self.placing.switch, &self.placing.port);
        set(self.holder.id(), "eth0");
    }

    /// Has each packet of the host leave so much later, such as `80ms`; says whether the kernel can (netem).
    #[must_use]
    pub fn delay(&self, time: &str) -> bool {
        self.exec("tc", &["qdisc", "add", "dev", "eth0", "root", "netem", "delay", time]).success
    }

    /// Has daemons that are started from now on see the time as it is plus `offset`, such as `+0` or `-2h`;
    /// those that were started so see it change at once. Needs the package faketime and a program that is not static.
    pub fn set_clock(&self, offset: &str) {
        // Nobody may read half of it.
        let (file, new) = (self.clock_file(), self.clock_file().with_extension("new"));
        fs::write(&new, offset).and_then(|()| fs::rename(new, file)).expect("the host's directory is writable");
    }

    fn clock_file(&self) -> PathBuf {
        self.placing.dir.join("clock")
    }

    /// Gives the host an /etc of its own: what is written there is gone with it.
    #[track_caller]
    pub fn own_etc(&self) {
        let etc = self.placing.dir.join("etc").display().to_string();
        let options = format!("lowerdir=/etc,upperdir={etc}/upper,workdir={etc}/work");
        let script = format!("mkdir -p {etc}/upper {etc}/work && mount -t overlay overlay -o {options} /etc");
        let ran = self.exec("sh", &["-c", &script]);
        assert!(ran.success, "{ran:?}");
    }

    /// Runs the client on this host.
    #[must_use]
    pub fn run(&self, args: &[&str]) -> Ran {
        let output = self.command(&self.placing.program).args(["-H", &self.socket()]).args(args).output();
        let output = output.expect("nsenter runs (package util-linux)");
        Ran {
            success: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs the client, which must succeed; returns what it printed.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert!(ran.success, "skep {args:?} on {}: {}\n{}", self.name(), ran.stderr, self.log());
        ran.stdout
    }

    /// Runs the client, which must fail; returns what it complained of.
    #[track_caller]
    pub fn fails(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert!(!ran.success, "skep {args:?} on {} should fail: {}", self.name(), ran.stdout);
        ran.stderr
    }

    /// What the stock client says, with its classic builder; it must succeed.
    #[allow(clippy::must_use_candidate, reason = "run for what it does")]
    pub fn docker(&self, args: &[&str]) -> String {
        let mut client = Command::new("docker");
        client.env("DOCKER_BUILDKIT", "0").arg("-H").arg(self.socket()).args(args);
        let output = client.output().expect("docker is installed");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "docker {args:?}: {text}");
        text
    }

    /// What the stock client says of something that must fail, after its exit code.
    #[allow(clippy::must_use_candidate, reason = "run for what it does")]
    pub fn docker_fails(&self, args: &[&str]) -> String {
        let client = Command::new("docker").arg("-H").arg(self.socket()).args(args).stdin(Stdio::null()).output();
        let output = client.expect("docker is installed");
        assert!(!output.status.success(), "{args:?} was taken: {}", String::from_utf8_lossy(&output.stdout));
        format!("{} {}", output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr))
    }

    /// Runs any program inside the host.
    #[must_use]
    pub fn exec(&self, program: &str, args: &[&str]) -> Ran {
        let output = self.command(Path::new(program)).args(args).output().expect("nsenter runs (package util-linux)");
        Ran {
            success: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The daemon's figures for Prometheus, by name and labels as they are printed.
    #[must_use]
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let text = self.exec("busybox", &["wget", "-q", "-O", "-", &format!("http://{METRICS}/metrics")]).stdout;
        let figure =
            |line: &str| line.rsplit_once(' ').and_then(|(name, value)| Some((name.to_owned(), value.parse().ok()?)));
        text.lines().filter(|line| !line.starts_with('#')).filter_map(figure).collect()
    }

    /// Starts a program inside the host that is ended with the rig, if its arguments name the
    /// host's directory.
    pub fn spawn(&self, program: &str, args: &[&str]) {
        let child = self.command(Path::new(program)).args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        drop(child.expect("the program is installed"));
    }

    /// Runs `work` on a thread whose network is the host's.
    pub fn within_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within_network_of(self.holder.id(), work)
    }

    /// Runs `work` on a thread whose network is the one in which the host keeps the swarm's.
    pub fn within_overlay<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = self.dir().join("run/overlay/netns");
        within_namespace(Path::new(&format!("/proc/{}/root{}", self.holder.id(), inside.display())), work)
    }

    /// A directory of the host for whatever a test needs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.placing.dir
    }

    /// The names and pids of the containers that run here.
    #[must_use]
    pub fn running(&self) -> Vec<(String, i64)> {
        let list = self.ok(&["ps", "--format", "{{.ID}}"]);
        let inspect = |id: &str| {
            // The client has no inspect of containers yet: the kernel and the record tell.
            let dir = fs::read_dir(self.data().join("containers"))
                .ok()?
                .flatten()
                .find(|entry| entry.file_name().to_string_lossy().starts_with(id))?;
            let record: Value = serde_json::from_slice(&fs::read(dir.path().join("container.json")).ok()?).ok()?;
            let name = record["config"]["name"].as_str()?.to_owned();
            Some((name, record["state"]["Running"]["pid"].as_i64()?))
        };
        let mut running: Vec<_> = list.lines().filter_map(inspect).collect();
        running.sort();
        running
    }

    /// Runs a program of the host inside the network of a container, which is known by the beginning of
    /// its name.
    #[track_caller]
    #[must_use]
    pub fn inside(&self, container: &str, command: &[&str]) -> String {
        let running = self.running();
        let found = running.iter().find(|(name, _)| name.starts_with(container));
        let pid = found.unwrap_or_else(|| panic!("{container} is not on {}: {running:?}", self.name())).1.to_string();
        let ran = self.exec("nsenter", &[&["-t", &pid, "-n"], command].concat());
        ran.stdout + &ran.stderr
    }

    /// What a server answers whom this host asks; nothing if there is no answer within 3 s.
    #[must_use]
    pub fn curl(&self, url: &str) -> String {
        self.exec("curl", &["-s", "-m", "3", "-g", url]).stdout
    }

    /// The addresses that a container's own name server gives for a name.
    #[track_caller]
    #[must_use]
    pub fn look_up(&self, container: &str, name: &str) -> BTreeSet<String> {
        let answer = self.inside(container, &["busybox", "nslookup", "-type=a", name, "127.0.0.11"]);
        // What stands before the first name is the server's own address.
        let behind = answer.split("Name:").skip(1).collect::<String>();
        behind.lines().filter_map(|line| line.strip_prefix("Address:")).map(|text| text.trim().to_owned()).collect()
    }

    /// Waits until `service` has its replicas, as in `3/3`, by what this host's daemon says.
    #[track_caller]
    pub fn await_replicas(&self, service: &str, want: &str) {
        wait_until(&format!("{service} has {want}"), LIMIT, || {
            let list = self.run(&["service", "ls", "--format", "{{.Name}} {{.Replicas}}"]);
            let found = list.stdout.lines().any(|line| line == format!("{service} {want}"));
            (found, format!("{list:?}\n{}", self.run(&["service", "ps", "--no-trunc", service]).stdout))
        });
    }

    /// Waits until the update of `service` has come to `want`, such as `completed`.
    #[track_caller]
    pub fn await_update(&self, service: &str, want: &str) {
        wait_until(&format!("{service}'s update is {want}"), LIMIT, || {
            let state = self.run(&["service", "inspect", "--format", "{{.UpdateStatus.State}}", service]);
            let tasks = self.run(&["service", "ps", "--no-trunc", service]).stdout;
            (state.stdout.trim() == want, format!("{state:?}\n{tasks}"))
        });
    }

    pub(crate) fn release(&mut self) {
        // Gone already is just as well.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        self.reap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.holder.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// The machine's own configuration must not reach into tests.
fn empty_config() -> Stdio {
    let (reader, mut writer) = std::io::pipe().expect("a pipe can be made");
    std::io::Write::write_all(&mut writer, b"{}").expect("two bytes fit");
    reader.into()
}

/// Runs `work` on a thread whose network is that of a process.
pub fn within_network_of<T: Send>(pid: u32, work: impl FnOnce() -> T + Send) -> T {
    within_namespace(Path::new(&format!("/proc/{pid}/ns/net")), work)
}

fn within_namespace<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> T {
    let namespace = fs::File::open(path).expect("the namespace is there");
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("root may enter");
            work()
        });
        inside.join().expect("the work does not panic")
    })
}
