//! `skep swarm …`

mod ca;

use std::io::{BufRead as _, IsTerminal as _, Read as _};

use serde_json::json;

use crate::client::Client;
use crate::output::{FormatArg, line};

/// No more is read of what may be an unlock key.
const KEY_LEN_MAX: u64 = 1024;

#[derive(clap::Subcommand)]
pub(crate) enum SwarmCommand {
    /// Make this host the first manager of a new swarm
    Init {
        /// Address the others reach this node at: IP or interface, with or without port
        #[arg(long, value_name = "ADDR")]
        advertise_addr: Option<String>,
        /// Address to listen on [default: 0.0.0.0:2377]
        #[arg(long, value_name = "ADDR")]
        listen_addr: Option<String>,
        /// active, pause or drain
        #[arg(long, default_value = "active")]
        availability: String,
        /// Pool that overlay networks get their subnets from (repeatable)
        #[arg(long, value_name = "CIDR")]
        default_addr_pool: Vec<String>,
        /// Prefix length of those subnets
        #[arg(long, default_value_t = 24)]
        default_addr_pool_mask_length: u8,
        #[command(flatten)]
        data_path: DataPathAddr,
        /// UDP port of the tunnels between nodes [default: 4789]
        #[arg(long, value_name = "PORT", default_value_t = 0, hide_default_value = true)]
        data_path_port: u16,
        /// Have this manager go on alone with all it knows, after a majority of the managers was lost for good
        #[arg(long)]
        force_new_cluster: bool,
        #[command(flatten)]
        settings: Settings,
    },
    /// Join a swarm, as worker or manager: the token says which
    Join {
        #[arg(long)]
        token: String,
        #[arg(long, value_name = "ADDR")]
        advertise_addr: Option<String>,
        #[arg(long, value_name = "ADDR")]
        listen_addr: Option<String>,
        #[arg(long, default_value = "active")]
        availability: String,
        #[command(flatten)]
        data_path: DataPathAddr,
        /// A manager of the swarm
        #[arg(value_name = "HOST:PORT")]
        manager: String,
    },
    /// Leave the swarm
    Leave {
        /// Leave though this node is a manager
        #[arg(short, long)]
        force: bool,
    },
    /// Change the swarm's settings
    Update(Settings),
    /// Show or rotate a join token
    JoinToken {
        /// Make a new token; the old one lets nobody in any more
        #[arg(long)]
        rotate: bool,
        /// Print the token alone
        #[arg(short, long)]
        quiet: bool,
        #[arg(value_parser = ["worker", "manager"])]
        role: String,
    },
    /// Show the swarm's root certificate, or put another one in its place
    Ca(ca::CaArgs),
    /// Unlock a manager that was started anew; reads the unlock key
    Unlock,
    /// Show or rotate the key that unlocks managers
    UnlockKey {
        /// Make a new key; the old one unlocks no manager that heard of it
        #[arg(long)]
        rotate: bool,
        /// Print the key alone
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show the swarm
    Inspect(FormatArg),
}

#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct DataPathAddr {
    /// Address or interface of the tunnels between nodes, if not the advertised one
    #[arg(long, value_name = "ADDR")]
    data_path_addr: Option<String>,
}

#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Settings {
    /// Life of node certificates, such as 2160h
    #[arg(long, value_name = "TIME")]
    cert_expiry: Option<String>,
    /// Time between heartbeats, such as 5s
    #[arg(long, value_name = "TIME")]
    dispatcher_heartbeat: Option<String>,
    /// Tasks kept per slot
    #[arg(long, value_name = "N")]
    task_history_limit: Option<i64>,
    /// Log entries between snapshots
    #[arg(long, value_name = "N")]
    snapshot_interval: Option<u64>,
    /// Older snapshots to keep
    #[arg(long, value_name = "N")]
    max_snapshots: Option<u64>,
    /// Have managers that start anew wait for an unlock key
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    autolock: Option<bool>,
    /// Not supported yet: the daemon says so
    #[arg(long = "external-ca", value_name = "protocol=cfssl,url=URL")]
    external_ca: Vec<String>,
}

impl Settings {
    fn apply(&self, spec: &mut serde_json::Value) -> anyhow::Result<()> {
        use super::values::duration;
        if let Some(text) = &self.cert_expiry {
            spec["CAConfig"]["NodeCertExpiry"] = json!(duration(text)?);
        }
        if let Some(text) = &self.dispatcher_heartbeat {
            spec["Dispatcher"]["HeartbeatPeriod"] = json!(duration(text)?);
        }
        if let Some(limit) = self.task_history_limit {
            spec["Orchestration"]["TaskHistoryRetentionLimit"] = json!(limit);
        }
        if let Some(interval) = self.snapshot_interval {
            spec["Raft"]["SnapshotInterval"] = json!(interval);
        }
        if let Some(kept) = self.max_snapshots {
            spec["Raft"]["KeepOldSnapshots"] = json!(kept);
        }
        if let Some(locked) = self.autolock {
            spec["EncryptionConfig"]["AutoLockManagers"] = json!(locked);
        }
        for text in &self.external_ca {
            let fields = super::values::fields(text);
            let authority = json!({"Protocol": fields.get("protocol"), "URL": fields.get("url")});
            super::values::push(&mut spec["CAConfig"]["ExternalCAs"], authority);
        }
        Ok(())
    }
}

pub(crate) async fn run(client: &Client, command: SwarmCommand) -> anyhow::Result<()> {
    match command {
        SwarmCommand::Init {
            advertise_addr,
            listen_addr,
            availability,
            default_addr_pool,
            default_addr_pool_mask_length,
            data_path,
            data_path_port,
            force_new_cluster,
            settings,
        } => {
            let mut spec = json!({});
            settings.apply(&mut spec)?;
            let body = json!({
                "AdvertiseAddr": advertise_addr.unwrap_or_default(), "ListenAddr": listen_addr.unwrap_or_default(),
                "Availability": availability, "DefaultAddrPool": default_addr_pool,
                "SubnetSize": default_addr_pool_mask_length, "Spec": spec,
                "DataPathAddr": data_path.data_path_addr.unwrap_or_default(), "DataPathPort": data_path_port,
                "ForceNewCluster": force_new_cluster,
            });
            let node = client.post("/swarm/init", &body).await?;
            line(&format!(
                "Swarm initialized: current node ({}) is now a manager.\n",
                node.as_str().unwrap_or_default()
            ))?;
            show_token(client, "worker", false).await?;
            if settings.autolock == Some(true) { show_unlock_key(client, false).await } else { Ok(()) }
        }
        SwarmCommand::Join { token, advertise_addr, listen_addr, availability, data_path, manager } => {
            let body = json!({
                "JoinToken": token, "RemoteAddrs": [manager], "Availability": availability,
                "AdvertiseAddr": advertise_addr.unwrap_or_default(), "ListenAddr": listen_addr.unwrap_or_default(),
                "DataPathAddr": data_path.data_path_addr.unwrap_or_default(),
            });
            client.post("/swarm/join", &body).await?;
            let info = client.get("/info").await?;
            let manager = info["Swarm"]["ControlAvailable"] == true;
            line(&format!("This node joined a swarm as a {}.", if manager { "manager" } else { "worker" }))
        }
        SwarmCommand::Leave { force } => {
            client.post(&format!("/swarm/leave?force={force}"), &json!({})).await?;
            line("Node left the swarm.")
        }
        SwarmCommand::Update(settings) => {
            let swarm = client.get("/swarm").await?;
            let mut spec = swarm["Spec"].clone();
            settings.apply(&mut spec)?;
            client.post(&format!("/swarm/update?version={}", swarm["Version"]["Index"]), &spec).await?;
            line("Swarm updated.")?;
            let was_locked = swarm["Spec"]["EncryptionConfig"]["AutoLockManagers"] == true;
            let now_locked = settings.autolock == Some(true) && !was_locked;
            if now_locked { show_unlock_key(client, false).await } else { Ok(()) }
        }
        SwarmCommand::JoinToken { rotate, quiet, role } => join_token(client, rotate, quiet, &role).await,
        SwarmCommand::Unlock => unlock(client).await,
        SwarmCommand::UnlockKey { rotate, quiet } => unlock_key(client, rotate, quiet).await,
        SwarmCommand::Ca(args) => ca::run(client, args).await,
        SwarmCommand::Inspect(format) => format.print(&client.get("/swarm").await?),
    }
}

async fn join_token(client: &Client, rotate: bool, quiet: bool, role: &str) -> anyhow::Result<()> {
    if rotate {
        let swarm = client.get("/swarm").await?;
        let which = if role == "worker" { "rotateWorkerToken" } else { "rotateManagerToken" };
        let path = format!("/swarm/update?version={}&{which}=true", swarm["Version"]["Index"]);
        client.post(&path, &swarm["Spec"]).await?;
        if !quiet {
            line(&format!("Successfully rotated {role} join token.\n"))?;
        }
    }
    show_token(client, role, quiet).await
}

/// Asks for the key without showing it; takes it from a pipe as well.
async fn unlock(client: &Client) -> anyhow::Result<()> {
    let info = client.get("/info").await?;
    match info["Swarm"]["LocalNodeState"].as_str() {
        Some("locked") => {}
        Some("inactive") => anyhow::bail!("this node is not part of a swarm"),
        _ => anyhow::bail!("swarm is not locked"),
    }
    let key = if std::io::stdin().is_terminal() {
        let terminal = console::Term::stderr();
        terminal.write_str("unlock key: ")?;
        terminal.read_secure_line()?
    } else {
        let mut key = String::new();
        std::io::stdin().lock().take(KEY_LEN_MAX).read_line(&mut key)?;
        key
    };
    client.post("/swarm/unlock", &json!({"UnlockKey": key.trim()})).await.map(drop)
}

async fn unlock_key(client: &Client, rotate: bool, quiet: bool) -> anyhow::Result<()> {
    if rotate {
        let swarm = client.get("/swarm").await?;
        let locks = swarm["Spec"]["EncryptionConfig"]["AutoLockManagers"] == true;
        anyhow::ensure!(locks, "there is no key to rotate: this swarm is not locked (swarm update --autolock)");
        let path = format!("/swarm/update?version={}&rotateManagerUnlockKey=true", swarm["Version"]["Index"]);
        client.post(&path, &swarm["Spec"]).await?;
        if !quiet {
            line("Successfully rotated manager unlock key.\n")?;
        }
    }
    show_unlock_key(client, quiet).await
}

async fn show_unlock_key(client: &Client, quiet: bool) -> anyhow::Result<()> {
    let found = client.get("/swarm/unlockkey").await?;
    let key = found["UnlockKey"].as_str().filter(|key| !key.is_empty());
    let key = key.ok_or_else(|| anyhow::anyhow!("no unlock key is set: this swarm is not locked"))?;
    if quiet {
        return line(key);
    }
    line(&format!(
        "A manager that is started anew waits for 'skep swarm unlock' and this key:\n\n    {key}\n\nKeep it where it \
         outlives the managers: without it none of them can be started again.\n"
    ))
}

async fn show_token(client: &Client, role: &str, quiet: bool) -> anyhow::Result<()> {
    let swarm = client.get("/swarm").await?;
    let member = if role == "worker" { "Worker" } else { "Manager" };
    let token = swarm["JoinTokens"][member].as_str().unwrap_or_default().to_owned();
    if quiet {
        return line(&token);
    }
    let info = client.get("/info").await?;
    let id = info["Swarm"]["NodeID"].as_str().unwrap_or_default();
    let node = client.get(&format!("/nodes/{id}")).await?;
    let addr = node["ManagerStatus"]["Addr"].as_str().unwrap_or_default();
    line(&format!(
        "To add a {role} to this swarm, run the following command:\n\n    skep swarm join --token {token} {addr}\n"
    ))
}
