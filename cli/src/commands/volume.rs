//! `skep volume …`

use serde_json::{Value, json};

use crate::client::{Client, escape};
use crate::commands::prune::{self, PruneAllArgs};
use crate::commands::values::{fields, members, optional_size};
use crate::output::{FormatArg, ListArgs, line};

#[derive(clap::Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume
    Create {
        /// Made up if absent
        #[arg(default_value = "")]
        name: String,
        /// local, or a storage driver that speaks CSI
        #[arg(short, long, default_value = "local")]
        driver: String,
        /// Option of the driver: type, device, o (repeatable)
        #[arg(short, long = "opt", value_name = "NAME=VALUE")]
        options: Vec<String>,
        #[arg(long = "label", value_name = "KEY=VALUE")]
        labels: Vec<String>,
        #[command(flatten)]
        cluster: Box<ClusterArgs>,
    },
    /// Change a volume of the swarm
    Update {
        /// active, pause (no new tasks) or drain (no tasks)
        #[arg(long)]
        availability: String,
        volume: String,
    },
    /// List the volumes
    Ls {
        /// Those of the swarm alone
        #[arg(long)]
        cluster: bool,
        #[command(flatten)]
        list: ListArgs,
    },
    /// Show volumes in full
    Inspect {
        #[arg(required = true)]
        volumes: Vec<String>,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Remove volumes that no container has
    Rm {
        /// It is no error if one is not there
        #[arg(short, long)]
        force: bool,
        #[arg(required = true)]
        volumes: Vec<String>,
    },
    /// Remove nameless volumes that no container has
    Prune(PruneAllArgs),
}

/// What volumes of the swarm have and those of one host have not; any of it asks for one of the swarm.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub(crate) struct ClusterArgs {
    /// Whether tasks may use it: active (the default), pause or drain
    #[arg(long, help_heading = "Of volumes of the swarm")]
    availability: Option<String>,
    /// Services may ask for any volume of a group, by group:GROUP
    #[arg(long, help_heading = "Of volumes of the swarm")]
    group: Option<String>,
    /// On how many nodes it may be at a time: single (the default) or multi
    #[arg(long, help_heading = "Of volumes of the swarm")]
    scope: Option<String>,
    /// How tasks may share it: none (the default), readonly, onewriter or all
    #[arg(long, help_heading = "Of volumes of the swarm")]
    sharing: Option<String>,
    /// mount, or block (the default, as with docker's client)
    #[arg(long = "type", value_name = "TYPE", help_heading = "Of volumes of the swarm")]
    kind: Option<String>,
    /// At least so large
    #[arg(long, value_name = "SIZE", help_heading = "Of volumes of the swarm")]
    required_bytes: Option<String>,
    /// At most so large
    #[arg(long, value_name = "SIZE", help_heading = "Of volumes of the swarm")]
    limit_bytes: Option<String>,
    /// A secret of the swarm for the storage driver, by the driver's key
    #[arg(long = "secret", value_name = "KEY=SECRET", help_heading = "Of volumes of the swarm")]
    secrets: Vec<String>,
    /// A place that it may be in (repeatable)
    #[arg(long, value_name = "DOMAIN=SEGMENT,…", help_heading = "Of volumes of the swarm")]
    topology_required: Vec<String>,
    /// A place that it had better be in (repeatable)
    #[arg(long, value_name = "DOMAIN=SEGMENT,…", help_heading = "Of volumes of the swarm")]
    topology_preferred: Vec<String>,
}

impl ClusterArgs {
    fn spec(&self) -> anyhow::Result<Value> {
        let mut access = json!({"Scope": self.scope, "Sharing": self.sharing});
        match self.kind.as_deref() {
            Some("mount") => access["MountVolume"] = json!({}),
            None | Some("block") => access["BlockVolume"] = json!({}),
            Some(other) => anyhow::bail!("{other:?} is no type of volume: use mount or block"),
        }
        let secrets = self.secrets.iter().flat_map(|text| fields(text));
        let secrets: Vec<_> = secrets.map(|(key, secret)| json!({"Key": key, "Secret": secret})).collect();
        let places =
            |texts: &[String]| -> Vec<Value> { texts.iter().map(|text| json!({"Segments": fields(text)})).collect() };
        Ok(json!({
            "Group": self.group, "AccessMode": access, "Availability": self.availability, "Secrets": secrets,
            "CapacityRange": {
                "RequiredBytes": optional_size(self.required_bytes.as_deref())?,
                "LimitBytes": optional_size(self.limit_bytes.as_deref())?,
            },
            "AccessibilityRequirements": {
                "Requisite": places(&self.topology_required), "Preferred": places(&self.topology_preferred),
            },
        }))
    }
}

fn cluster_row(volume: &Value) -> Value {
    let cluster = &volume["ClusterVolume"];
    let nodes = cluster["PublishStatus"].as_array().map_or(0, Vec::len);
    let status = match (cluster["Info"].is_object(), nodes) {
        (false, _) => "pending creation".to_owned(),
        (true, 0) => "created".to_owned(),
        (true, 1) => "in use (1 node)".to_owned(),
        (true, nodes) => format!("in use ({nodes} nodes)"),
    };
    json!({
        "Name": volume["Name"], "Group": cluster["Spec"]["Group"].as_str().unwrap_or_default(), "Driver": volume["Driver"],
        "Availability": cluster["Spec"]["Availability"], "Status": status,
    })
}

pub(crate) async fn run(client: &Client, command: VolumeCommand) -> anyhow::Result<()> {
    match command {
        VolumeCommand::Create { name, driver, options, labels, cluster } => {
            let mut body =
                json!({"Name": name, "Driver": driver, "DriverOpts": members(&options), "Labels": members(&labels)});
            if *cluster != ClusterArgs::default() {
                body["ClusterVolumeSpec"] = cluster.spec()?;
            }
            let made = client.post("/volumes/create", &body).await?;
            line(made["Name"].as_str().unwrap_or_default())
        }
        VolumeCommand::Update { availability, volume } => {
            let path = format!("/volumes/{}", escape(&volume));
            let mut cluster = client.get(&path).await?["ClusterVolume"].take();
            anyhow::ensure!(
                cluster.is_object(),
                "volume {volume} is one of this host alone: only volumes of the swarm can be updated"
            );
            cluster["Spec"]["Availability"] = json!(availability);
            let version = &cluster["Version"]["Index"];
            client.put(&format!("{path}?version={version}"), &json!({"Spec": cluster["Spec"]})).await?;
            line(&volume)
        }
        VolumeCommand::Ls { cluster: true, list } => {
            let answer = client.get(&format!("/volumes?{}", list.query()?)).await?;
            let volumes = answer["Volumes"].as_array().into_iter().flatten();
            let rows: Vec<_> = volumes.filter(|volume| volume["ClusterVolume"].is_object()).map(cluster_row).collect();
            let columns = [
                ("Name", "VOLUME NAME"),
                ("Group", "GROUP"),
                ("Driver", "DRIVER"),
                ("Availability", "AVAILABILITY"),
                ("Status", "STATUS"),
            ];
            list.print(&columns, &rows)
        }
        VolumeCommand::Ls { cluster: false, list } => {
            let answer = client.get(&format!("/volumes?{}", list.query()?)).await?;
            let row =
                |volume: &Value| json!({"ID": volume["Name"], "Name": volume["Name"], "Driver": volume["Driver"]});
            let rows: Vec<_> = answer["Volumes"].as_array().into_iter().flatten().map(row).collect();
            list.print(&[("Driver", "DRIVER"), ("Name", "VOLUME NAME")], &rows)
        }
        VolumeCommand::Inspect { volumes, format } => {
            let mut found = Vec::new();
            for volume in &volumes {
                found.push(client.get(&format!("/volumes/{}", escape(volume))).await?);
            }
            format.print_all(&found)
        }
        VolumeCommand::Rm { force, volumes } => {
            for volume in &volumes {
                client.delete(&format!("/volumes/{}?force={force}", escape(volume))).await?;
                line(volume)?;
            }
            Ok(())
        }
        VolumeCommand::Prune(args) => prune::run_volumes(client, &args).await,
    }
}
