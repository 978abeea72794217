//! `skep volume …`

use serde_json::{Value, json};

use crate::client::{Client, escape};
use crate::commands::prune::{self, PruneAllArgs};
use crate::commands::values::members;
use crate::output::{FormatArg, ListArgs, line};

#[derive(clap::Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume
    Create {
        /// Made up if absent
        #[arg(default_value = "")]
        name: String,
        /// Only local is there
        #[arg(short, long, default_value = "local")]
        driver: String,
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
        /// It is no error if one is not there
        #[arg(short, long)]
        force: bool,
        #[arg(required = true)]
        volumes: Vec<String>,
    },
    /// Remove nameless volumes that no container has
    Prune(PruneAllArgs),
}

pub(crate) async fn run(client: &Client, command: VolumeCommand) -> anyhow::Result<()> {
    match command {
        VolumeCommand::Create { name, driver, options, labels } => {
            let body =
                json!({"Name": name, "Driver": driver, "DriverOpts": members(&options), "Labels": members(&labels)});
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
