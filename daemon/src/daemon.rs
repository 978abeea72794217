//! Puts the parts together and runs until told to stop.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use skep_engine::{Engine, EngineConfig, RegistryConfig, host_name};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{DaemonConfig, DataPathWay, Listener};
use crate::http::build::buildkit::BuildKit;
use crate::http::{self, tls_listener};
use crate::metrics;
use crate::swarm::{Swarm, SwarmConfig};

/// This build's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

const GIVE_BACK_EVERY: Duration = Duration::from_secs(10);
const DRAIN_LIMIT: Duration = Duration::from_secs(3);

/// What request handlers share.
pub(crate) struct Daemon {
    /// As it was at the start; see [`Reloadable`].
    pub(crate) config: DaemonConfig,
    in_force: Mutex<Reloadable>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) swarm: Arc<Swarm>,
    /// Names this daemon, as `docker info` shows it.
    pub(crate) id: String,
    pub(crate) stop: CancellationToken,
    pub(crate) build_kit: BuildKit,
}

/// What of the configuration a reload puts in force.
#[derive(Clone)]
pub(crate) struct Reloadable {
    pub(crate) registries: RegistryConfig,
    pub(crate) log_level: String,
}

impl Reloadable {
    fn of(config: &DaemonConfig) -> Self {
        Self { registries: config.registries.clone(), log_level: config.log_level.clone() }
    }
}

impl Daemon {
    pub(crate) fn in_force(&self) -> Reloadable {
        self.in_force.lock().expect("nobody panics while holding it").clone()
    }

    /// The configuration in force, as events tell of it.
    fn attributes(&self) -> BTreeMap<String, String> {
        let Reloadable { registries, log_level } = self.in_force();
        let list = |list: Vec<&String>| serde_json::json!(list).to_string();
        let labels: Vec<_> = self.config.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let attributes = [
            ("name", host_name()),
            ("debug", (log_level == "debug").to_string()),
            ("labels", list(labels.iter().collect())),
            ("live-restore", "true".into()),
            ("default-runtime", self.config.default_runtime.clone()),
            ("registry-mirrors", list(registries.mirrors.iter().collect())),
            ("insecure-registries", list(registries.insecure.iter().collect())),
            ("max-concurrent-downloads", registries.downloads_at_once.to_string()),
            ("max-concurrent-uploads", registries.uploads_at_once.to_string()),
        ];
        attributes.map(|(name, value)| (name.to_owned(), value)).into()
    }
}

fn engine_config(config: &DaemonConfig) -> anyhow::Result<EngineConfig> {
    let mut engine = EngineConfig::new(
        config.data_root.clone(),
        config.exec_root.clone(),
        std::env::current_exe().context("the daemon's own program is not found")?,
    );
    engine.cgroup_parent.clone_from(&config.cgroup_parent);
    engine.no_new_privileges = config.no_new_privileges;
    engine.id_map.clone_from(&config.id_map);
    engine.storage = config.storage;
    engine.log = config.log.clone();
    engine.runtime = config.runtimes.get(&config.default_runtime).cloned();
    engine.bridge = config.networks.bridge.clone();
    engine.userland_proxy = config.networks.userland_proxy;
    engine.pools.clone_from(&config.networks.pools);
    engine.host_gateways.clone_from(&config.networks.host_gateways);
    engine.defaults = config.containers.defaults.clone();
    engine.init_path.clone_from(&config.containers.init_path);
    engine.cdi_dirs.clone_from(&config.containers.cdi_dirs);
    engine.registries = config.registries.clone();
    Ok(engine)
}

/// Runs the daemon until SIGTERM or SIGINT. SIGHUP has it read its file again; `set_log_level` is told
/// what the log's level is from then on.
pub async fn run(config: DaemonConfig, set_log_level: impl Fn(&str)) -> anyhow::Result<()> {
    // Registries and peers both use it; a second installation is refused and harmless.
    drop(rustls::crypto::ring::default_provider().install_default());
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "the daemon makes containers and needs root: start it with sudo");
    // Storage drivers in containers are shown the directories for their sockets, and for volumes of the swarm.
    let of_drivers = [&config.data_root, &config.exec_root].map(|dir| dir.join("csi"));
    for dir in &of_drivers {
        std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    std::fs::set_permissions(&config.data_root, std::fs::Permissions::from_mode(0o710))?;
    let _only_one = lock(&config.data_root)?;
    if let Some(pidfile) = &config.pidfile {
        std::fs::write(pidfile, format!("{}\n", std::process::id()))?;
    }
    let engine = Engine::open(engine_config(&config)?)?;
    let (dir, run_dir) = (config.data_root.join("swarm"), config.exec_root.clone());
    let (labels, key_period, heartbeat) = (config.labels.clone(), config.overlay_key_period, config.raft_heartbeat);
    let in_kernel = uses_kernel_wireguard(config.data_path).await?;
    let generic = config.generic_resources.clone();
    let volumes_dir = config.data_root.join("csi");
    let swarm = SwarmConfig { dir, run_dir, volumes_dir, labels, generic, key_period, heartbeat, in_kernel };
    let swarm = Swarm::resume(swarm, engine.clone()).await?;
    let daemon = Arc::new(Daemon {
        id: daemon_id(&config.data_root)?,
        engine: engine.clone(),
        swarm: swarm.clone(),
        stop: CancellationToken::new(),
        build_kit: BuildKit::new(&config.data_root),
        in_force: Mutex::new(Reloadable::of(&config)),
        config,
    });
    let servers = TaskTracker::new();
    for listener in &daemon.config.listeners {
        serve(&daemon, listener, &servers).await?;
    }
    if let Some(addr) = &daemon.config.metrics_addr {
        let server = axum::serve(bind_tcp(addr).await?, metrics::router(daemon.clone()));
        let server = server.with_graceful_shutdown(daemon.stop.clone().cancelled_owned());
        servers.spawn(async move { drop(server.await) });
    }
    tokio::spawn(give_back_memory(daemon.stop.clone()));
    // Starting took far more of the program than running does. A convenience, no condition.
    drop(skep_engine::let_go_of_code());
    tracing::info!(version = VERSION, "the daemon is ready");
    let mut hangup = signal(SignalKind::hangup())?;
    let mut ended = std::pin::pin!(wait_for_signal());
    loop {
        tokio::select! {
            ended = &mut ended => break ended?,
            _ = hangup.recv() => reload(&daemon, &set_log_level),
        }
    }
    tracing::info!("the daemon stops; containers go on");
    swarm.stop().await;
    daemon.stop.cancel();
    servers.close();
    // Streams that clients hold open are cut after a while.
    drop(tokio::time::timeout(DRAIN_LIMIT, servers.wait()).await);
    engine.close(Duration::from_millis(100)).await;
    for listener in &daemon.config.listeners {
        if let Listener::Unix(path) = listener {
            // The next start removes it otherwise.
            let _ = std::fs::remove_file(path);
        }
    }
    if let Some(pidfile) = &daemon.config.pidfile {
        let _ = std::fs::remove_file(pidfile);
    }
    Ok(())
}

/// Puts in force what of the file can be without a restart, and says what cannot.
fn reload(daemon: &Daemon, set_log_level: &impl Fn(&str)) {
    match daemon.config.reload() {
        Ok(next) => {
            daemon.engine.set_registries(next.registries.clone());
            set_log_level(&next.log_level);
            *daemon.in_force.lock().expect("nobody panics while holding it") = Reloadable::of(&next);
            daemon.engine.tell_daemon("reload", &daemon.id, daemon.attributes());
            let later = daemon.config.needing_restart(&next);
            if later.is_empty() {
                tracing::info!("the configuration was read again");
            } else {
                tracing::warn!(settings = later.join(", "), "the configuration was read again; these need a restart");
            }
        }
        Err(error) => tracing::error!(%error, "the configuration was read again and changes nothing"),
    }
}

/// What a burst of work took and freed is not kept for the next one.
async fn give_back_memory(stop: CancellationToken) {
    let mut freed = skep_engine::FreedMemory::default();
    while tokio::time::timeout(GIVE_BACK_EVERY, stop.cancelled()).await.is_err() {
        tokio::task::block_in_place(|| freed.give_back());
    }
}

/// Two daemons on one data directory would destroy it.
fn lock(data_root: &Path) -> anyhow::Result<std::fs::File> {
    let path = data_root.join("daemon.lock");
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
    file.try_lock().map_err(|_| anyhow::anyhow!("another daemon uses {}: stop it first", data_root.display()))?;
    Ok(file)
}

fn daemon_id(data_root: &Path) -> anyhow::Result<String> {
    let path = data_root.join("daemon-id");
    if let Ok(id) = std::fs::read_to_string(&path) {
        return Ok(id.trim().to_owned());
    }
    let bytes: [u8; 16] = rand::random();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let id = format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    let mut file = std::fs::File::create(&path)?;
    writeln!(file, "{id}")?;
    Ok(id)
}

async fn serve(daemon: &Arc<Daemon>, listener: &Listener, servers: &TaskTracker) -> anyhow::Result<()> {
    let stop = daemon.stop.clone();
    match listener {
        Listener::Unix(path) => {
            let listener = bind_unix(path, daemon.config.group.as_deref())?;
            let server = axum::serve(listener, http::service(daemon.clone()));
            let server = server.with_graceful_shutdown(stop.cancelled_owned());
            servers.spawn(async move { drop(server.await) });
        }
        Listener::Tcp(addr) => {
            let listener = bind_tcp(addr).await?;
            match &daemon.config.tls {
                None => {
                    let server = axum::serve(listener, http::service(daemon.clone()));
                    let server = server.with_graceful_shutdown(stop.cancelled_owned());
                    servers.spawn(async move { drop(server.await) });
                }
                Some(tls) => {
                    let listener = tls_listener::TlsListener::new(listener, tls)?;
                    let server = axum::serve(listener, http::service(daemon.clone()));
                    let server = server.with_graceful_shutdown(stop.cancelled_owned());
                    servers.spawn(async move { drop(server.await) });
                }
            }
        }
    }
    Ok(())
}

async fn bind_tcp(addr: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.with_context(|| format!("tcp://{addr} cannot be listened on"))
}

/// Root alone may use the socket, and a group: the one that is named, or `skep` or `docker` where there is one.
fn bind_unix(path: &Path, group: Option<&str>) -> anyhow::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // A socket that a killed daemon left; anything else stays.
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("unix://{} cannot be listened on", path.display()))?;
    let gid = match group {
        Some(name) => Some(name.parse().ok().or_else(|| group_id(name)).with_context(|| {
            format!("group {name:?}, which is to use {}, is not in /etc/group: add it", path.display())
        })?),
        None => ["skep", "docker"].into_iter().find_map(group_id),
    };
    if let Some(gid) = gid {
        std::os::unix::fs::chown(path, None, Some(gid))?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Read from the file itself: a static binary cannot load the host's name services.
fn group_id(name: &str) -> Option<u32> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    let mut rows = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    rows.find(|row| row.first() == Some(&name))?.get(2)?.parse().ok()
}

async fn wait_for_signal() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Whether the kernel's own WireGuard is used; an error if it has to be and there is none.
async fn uses_kernel_wireguard(way: DataPathWay) -> anyhow::Result<bool> {
    let there = way != DataPathWay::Userspace && skep_overlay_net::has_kernel_wireguard().await;
    anyhow::ensure!(
        there || way != DataPathWay::Kernel,
        "data-path kernel cannot be had: this kernel has no WireGuard; load it (modprobe wireguard), or use auto or userspace"
    );
    Ok(there)
}
