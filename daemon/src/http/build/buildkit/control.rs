//! What clients ask of the builder itself.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use skep_api::buildkit::control_server::Control;
use skep_api::buildkit::{
    BuildkitVersion, DiskUsageRequest, DiskUsageResponse, Exporter, InfoRequest, InfoResponse, ListWorkersRequest,
    ListWorkersResponse, Platform, PruneRequest, SolveRequest, SolveResponse, StatusRequest, StatusResponse,
    UsageRecord, WorkerRecord,
};
use skep_engine::Image;
use tonic::{Request, Response, Status};

use super::Served;
use super::job::Job;
use crate::daemon::VERSION;

/// What a build comes to.
#[derive(Debug, PartialEq, Eq)]
enum Output {
    /// An image here, with these names.
    Image(Vec<String>),
    /// Nothing that is kept, but the image without a name.
    Nothing,
}

impl Output {
    fn read(request: &SolveRequest) -> Result<Self, Status> {
        let old = (!request.exporter.is_empty())
            .then(|| Exporter { kind: request.exporter.clone(), attrs: request.exporter_attrs.clone() });
        let exporter = match request.exporters.as_slice() {
            [] => old,
            [one] => Some(one.clone()),
            _ => return Err(Status::unimplemented("a build has one output here: give one --output")),
        };
        let Some(exporter) = exporter else { return Ok(Self::Nothing) };
        match exporter.kind.as_str() {
            "moby" | "image" => {
                let names = exporter.attrs.get("name").map(String::as_str).unwrap_or_default();
                Ok(Self::Image(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()))
            }
            other => Err(Status::unimplemented(format!(
                "--output type={other} is not supported by this builder: build an image, and use 'docker save' or 'docker cp'"
            ))),
        }
    }
}

impl Served {
    /// Builds, or waits for a client that does it by itself; returns the image.
    async fn built(&self, job: &Arc<Job>, request: &SolveRequest) -> Result<Option<Image>, Status> {
        if request.definition.as_ref().is_some_and(|definition| !definition.def.is_empty()) {
            return Err(Status::unimplemented("this builder runs Dockerfiles, no steps in BuildKit's own form (LLB)"));
        }
        let name = match request.frontend.as_str() {
            "" => {
                let mut returned = job.returned.subscribe();
                let said = returned.wait_for(Option::is_some).await;
                let said = said.map_err(|error| Status::internal(error.to_string()))?.clone();
                said.unwrap_or(Ok(None))?
            }
            frontend => Some(self.solve_by(job, frontend, &request.frontend_attrs).await?),
        };
        Ok(name.and_then(|name| job.image(&name)))
    }

    pub(super) async fn solve_by(
        &self,
        job: &Arc<Job>,
        frontend: &str,
        attributes: &HashMap<String, String>,
    ) -> Result<String, Status> {
        if frontend != "dockerfile.v0" {
            return Err(Status::unimplemented(format!(
                "the frontend {frontend} is not supported: this builder has dockerfile.v0"
            )));
        }
        job.build(&self.daemon.engine, &self.kit.sessions, attributes).await
    }

    /// Gives an image its names.
    fn export(&self, job: &Job, image: &Image, names: &[String]) -> Result<HashMap<String, String>, Status> {
        let step = job.progress.begin("exporting to image");
        job.progress.note(step, &format!("writing image {}", image.id), 0, true);
        let named = names.iter().try_for_each(|name| {
            self.daemon.engine.tag(&image.id, name).map_err(|error| Status::invalid_argument(error.to_string()))?;
            job.progress.note(step, &format!("naming to {name}"), 0, true);
            Ok::<_, Status>(())
        });
        job.progress.finish(step, named.as_ref().err().map(Status::message));
        named?;
        let mut answer = HashMap::from([
            ("containerimage.digest".to_owned(), image.id.clone()),
            ("containerimage.config.digest".to_owned(), image.id.clone()),
        ]);
        if !names.is_empty() {
            answer.insert("image.name".to_owned(), names.join(","));
        }
        Ok(answer)
    }

    pub(super) fn workers(&self) -> Vec<WorkerRecord> {
        let own = skep_engine::Platform::own();
        let platform = Platform { architecture: own.architecture, os: own.os, variant: own.variant };
        let gateway = self.daemon.engine.bridge_gateway().to_string();
        vec![WorkerRecord {
            id: self.daemon.id.clone(),
            labels: HashMap::from([
                ("org.mobyproject.buildkit.worker.executor".to_owned(), "skep".to_owned()),
                ("org.mobyproject.buildkit.worker.moby.host-gateway-ip".to_owned(), gateway),
            ]),
            platforms: vec![platform],
            version: Some(version()),
        }]
    }
}

fn version() -> BuildkitVersion {
    BuildkitVersion { package: "skep".to_owned(), version: format!("v{VERSION}"), revision: String::new() }
}

#[tonic::async_trait]
impl Control for Served {
    type PruneStream = Pin<Box<dyn Stream<Item = Result<UsageRecord, Status>> + Send>>;
    type StatusStream = Pin<Box<dyn Stream<Item = Result<StatusResponse, Status>> + Send>>;

    async fn solve(&self, request: Request<SolveRequest>) -> Result<Response<SolveResponse>, Status> {
        let request = request.into_inner();
        let job = self.kit.jobs.begin(&request.r#ref, &request.session)?;
        let output = Output::read(&request)?;
        let image = self.built(&job, &request).await?;
        let exporter_response = match (&output, image) {
            (Output::Image(names), Some(image)) => self.export(&job, &image, names)?,
            _ => HashMap::new(),
        };
        Ok(Response::new(SolveResponse { exporter_response }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<Self::StatusStream>, Status> {
        let job = self.kit.jobs.get(&request.into_inner().r#ref).await?;
        let told = futures::stream::unfold((job, 0), |(job, seen)| async move {
            let message = job.progress.next(seen).await?;
            Some((Ok(message), (job, seen + 1)))
        });
        Ok(Response::new(Box::pin(told)))
    }

    async fn list_workers(&self, _: Request<ListWorkersRequest>) -> Result<Response<ListWorkersResponse>, Status> {
        Ok(Response::new(ListWorkersResponse { record: self.workers() }))
    }

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse { version: Some(version()) }))
    }

    async fn disk_usage(&self, _: Request<DiskUsageRequest>) -> Result<Response<DiskUsageResponse>, Status> {
        let record = self.daemon.engine.build_caches().into_iter().map(|(id, bytes)| usage(id, bytes)).collect();
        Ok(Response::new(DiskUsageResponse { record }))
    }

    async fn prune(&self, _: Request<PruneRequest>) -> Result<Response<Self::PruneStream>, Status> {
        let bytes = self.daemon.engine.prune_builds().map_err(|error| Status::internal(error.to_string()))?;
        let gone = (bytes > 0).then(|| Ok(usage("build-cache".to_owned(), bytes)));
        Ok(Response::new(Box::pin(futures::stream::iter(gone))))
    }
}

fn usage(id: String, bytes: u64) -> UsageRecord {
    let size = i64::try_from(bytes).unwrap_or(i64::MAX);
    UsageRecord { id, size, mutable: true, record_type: "exec.cachemount".to_owned(), ..UsageRecord::default() }
}
