//! What differs from task to task of a service: templates in environment, host name and mounts, such as
//! `{{.Node.Hostname}}-{{.Task.Slot}}`, which a node fills in for each task.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::NodeId;
use crate::container::ContainerSpec;
use crate::task::{Slot, Task};
use crate::template::{TemplateError, render, render_with};

/// The one driver of templates that secrets and configs may name.
pub const TEMPLATE_DRIVER: &str = "golang";

/// Who fills templates in.
#[derive(Clone, Debug)]
pub struct TemplateNode {
    pub id: NodeId,
    pub hostname: String,
    /// As nodes tell of them: `linux`, `x86_64`.
    pub os: String,
    pub architecture: String,
}

/// What templates can name: `.Service.{ID,Name,Labels}`, `.Node.{ID,Hostname,Platform.{OS,Architecture}}` and
/// `.Task.{ID,Name,Slot}`.
#[derive(Clone, Debug)]
pub struct TemplateContext(Value);

impl TemplateContext {
    #[must_use]
    pub fn new(task: &Task, node: &TemplateNode) -> Self {
        let slot = match task.slot {
            Slot::Replica(number) => number.to_string(),
            Slot::Node(id) => id.to_string(),
        };
        Self(json!({
            "Service": {"ID": task.service_id.to_string(), "Name": task.service_name, "Labels": task.labels},
            "Node": {
                "ID": node.id.to_string(), "Hostname": node.hostname,
                "Platform": {"OS": node.os, "Architecture": node.architecture},
            },
            "Task": {"ID": task.id.to_string(), "Name": task.name(), "Slot": slot},
        }))
    }

    /// That of some task of a service, to see whether its templates can be filled at all.
    #[must_use]
    pub fn sample(name: &str, labels: &BTreeMap<String, String>) -> Self {
        Self(json!({
            "Service": {"ID": "service", "Name": name, "Labels": labels},
            "Node": {"ID": "node", "Hostname": "node", "Platform": {"OS": "linux", "Architecture": "x86_64"}},
            "Task": {"ID": "task", "Name": format!("{name}.1.task"), "Slot": "1"},
        }))
    }
}

/// What a container has of some kind and name, or why it has not.
pub type Found = Result<String, String>;

impl TemplateContext {
    /// Fills in what a secret or a config holds. Beside what others can name, it can call `secret "TARGET"`, `config "TARGET"`
    /// and `env "NAME"`: `other` says what the container has of that kind and name.
    pub fn fill_payload(
        &self,
        text: &str,
        other: &dyn Fn(&str, &str) -> Option<Found>,
    ) -> Result<String, TemplateError> {
        render_with(text, &self.0, &|function, arguments| {
            let [Value::String(name)] = arguments else { return None };
            other(function, name).map(|found| found.map(Value::from))
        })
    }
}

impl ContainerSpec {
    /// Whether anything of a task may have to be filled in: secrets and configs say it themselves.
    #[must_use]
    pub fn may_be_filled(&self) -> bool {
        self.has_templates() || !self.secrets.is_empty() || !self.configs.is_empty()
    }

    /// Whether tasks differ in what templates come to.
    #[must_use]
    pub fn has_templates(&self) -> bool {
        let mounts = self.mounts.iter().flat_map(|mount| {
            let options = mount.volume_options.iter();
            let values = options.flat_map(|options| {
                options.labels.values().chain(options.driver_config.iter().flat_map(|driver| driver.options.values()))
            });
            [&mount.source, &mount.target].into_iter().chain(values)
        });
        self.env.iter().chain([&self.hostname]).chain(mounts).any(|text| is_template(text))
    }

    /// The same with all templates filled in.
    pub fn filled(&self, context: &TemplateContext) -> Result<Self, TemplateError> {
        let mut spec = self.clone();
        let fill = |text: &mut String| {
            if is_template(text) {
                *text = render(text, &context.0)?;
            }
            Ok(())
        };
        spec.env.iter_mut().chain([&mut spec.hostname]).try_for_each(fill)?;
        for mount in &mut spec.mounts {
            [&mut mount.source, &mut mount.target].into_iter().try_for_each(fill)?;
            if let Some(options) = &mut mount.volume_options {
                options.labels.values_mut().try_for_each(fill)?;
                options.driver_config.iter_mut().flat_map(|driver| driver.options.values_mut()).try_for_each(fill)?;
            }
        }
        Ok(spec)
    }
}

fn is_template(text: &str) -> bool {
    text.contains("{{")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::{Mount, VolumeOptions};

    #[test]
    fn what_differs_is_filled_in_and_the_rest_left_alone() {
        let spec = ContainerSpec {
            env: vec!["SERVICE={{.Service.Name}}".into(), r"PLAIN=a\tb".into()],
            hostname: "{{.Node.Hostname}}-{{.Task.Slot}}".into(),
            args: vec!["{{.Task.ID}}".into()],
            mounts: vec![Mount {
                source: r#"data-{{index .Service.Labels "of-whom"}}"#.into(),
                target: "/{{.Node.Platform.OS}}".into(),
                ..Mount::default()
            }],
            ..ContainerSpec::default()
        };
        let labels = [("of-whom".to_owned(), "bees".to_owned())].into();
        let filled = spec.filled(&TemplateContext::sample("web", &labels)).unwrap();
        assert_eq!(filled.env, ["SERVICE=web", r"PLAIN=a\tb"]);
        assert_eq!(filled.hostname, "node-1");
        assert_eq!((filled.mounts[0].source.as_str(), filled.mounts[0].target.as_str()), ("data-bees", "/linux"));
        assert_eq!(filled.args, spec.args, "as Docker has it");
        assert!(spec.has_templates() && !filled.has_templates());
        let options =
            VolumeOptions { labels: [("of".into(), "{{.Task.ID}}".into())].into(), ..VolumeOptions::default() };
        let volume = Mount { volume_options: Some(options), ..Mount::default() };
        let spec = ContainerSpec { mounts: vec![volume], ..ContainerSpec::default() };
        assert!(
            spec.has_templates() && !spec.filled(&TemplateContext::sample("web", &labels)).unwrap().has_templates()
        );
        for (wrong, why) in [("{{.Service.Colour}}", "Colour"), ("{{.Task.Slot", "}}"), ("{{nope}}", "nope")] {
            let spec = ContainerSpec { hostname: wrong.into(), ..ContainerSpec::default() };
            let error = spec.filled(&TemplateContext::sample("web", &labels)).unwrap_err().to_string();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }
}
