//! `skep volume …`

use serde_json::{Map, Value, json};

use crate::client::{Client, escape};
use crate::output::{FormatArg, ListArgs, line};

#[derive(clap::Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume
    Create {
        /// Made up if absent
        #[arg(default_value = "")]
        name: String,
        /// Option of the driver: type, device, o (repeatable)
        #[arg(short, long = "opt", value_name = "NAME=VALUE")]
        options: Vec<String>,
        #[arg(long = "label", value_name = "KEY=VALUE")]
        labels: Vec<String>,
    },
    /// List the volumes
    Ls(ListArgs),
    /// Show volumes in full
    Inspect {
        #[arg(required = true)]
        volumes: Vec<String>,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Remove volumes that no container has
    Rm {
        #[arg(required = true)]
        volumes: Vec<String>,
    },
    /// Remove nameless volumes that no container has
    Prune {
        /// Those with a name, too
        #[arg(short, long)]
        all: bool,
    },
}

fn members(pairs: &[String]) -> Value {
    let pair = |text: &String| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        (key.to_owned(), json!(value))
    };
    Value::Object(pairs.iter().map(pair).collect::<Map<_, _>>())
}

pub(crate) async fn run(client: &Client, command: VolumeCommand) -> anyhow::Result<()> {
    match command {
        VolumeCommand::Create { name, options, labels } => {
            let body = json!({"Name": name, "DriverOpts": members(&options), "Labels": members(&labels)});
            let made = client.post("/volumes/create", &body).await?;
            line(made["Name"].as_str().unwrap_or_default())
        }
        VolumeCommand::Ls(list) => {
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
        VolumeCommand::Rm { volumes } => {
            for volume in &volumes {
                client.delete(&format!("/volumes/{}", escape(volume))).await?;
                line(volume)?;
            }
            Ok(())
        }
        VolumeCommand::Prune { all } => {
            let filters = if all { escape(r#"{"all":["true"]}"#) } else { String::new() };
            let pruned = client.post(&format!("/volumes/prune?filters={filters}"), &json!({})).await?;
            for name in pruned["VolumesDeleted"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                line(name)?;
            }
            line(&format!("{} bytes are free now", pruned["SpaceReclaimed"]))
        }
    }
}
