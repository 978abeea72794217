//! What clients ask of the builder itself.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use skep_api::buildkit::control_server::Control;
use skep_api::buildkit::{
    BuildkitVersion, DiskUsageRequest, DiskUsageResponse, InfoRequest, InfoResponse, ListWorkersRequest,
    ListWorkersResponse, Platform, PruneRequest, SolveRequest, SolveResponse, StatusRequest, StatusResponse,
    UsageRecord, WorkerRecord,
};
use skep_engine::Image;
use tonic::{Request, Response, Status};

use super::Served;
use super::job::Job;
use super::output::Output;
use crate::daemon::VERSION;

impl Served {
    /// Builds and hands over.
    pub(super) async fn solve_job(&self, job: &Arc<Job>, request: &SolveRequest) -> Result<SolveResponse, Status> {
        let output = Output::read(request)?;
        let exporter_response = match self.built(job, request).await? {
            Some(image) => self.hand_over(job, &image, &output).await?,
            None => HashMap::new(),
        };
        Ok(SolveResponse { exporter_response })
    }

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
        job.build(&self.daemon.engine, self.kit(), attributes).await
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
        let job = self.kit().jobs.begin(&request.r#ref, &request.session, None)?;
        self.solve_job(&job, &request).await.map(Response::new)
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<Self::StatusStream>, Status> {
        let job = self.kit().jobs.get(&request.into_inner().r#ref).await?;
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
        let caches =
            self.daemon.engine.build_caches().into_iter().map(|(id, bytes)| usage(id, bytes, "exec.cachemount"));
        let directories =
            self.kit().directories.usage().into_iter().map(|(id, bytes)| usage(id, bytes, "source.local"));
        let record = caches.chain(directories).collect();
        Ok(Response::new(DiskUsageResponse { record }))
    }

    async fn prune(&self, _: Request<PruneRequest>) -> Result<Response<Self::PruneStream>, Status> {
        let bytes = self.kit().prune(&self.daemon.engine).map_err(|error| Status::internal(error.to_string()))?;
        let gone = (bytes > 0).then(|| Ok(usage("build-cache".to_owned(), bytes, "internal")));
        Ok(Response::new(Box::pin(futures::stream::iter(gone))))
    }
}

fn usage(id: String, bytes: u64, kind: &str) -> UsageRecord {
    let size = i64::try_from(bytes).unwrap_or(i64::MAX);
    UsageRecord { id, size, mutable: true, record_type: kind.to_owned(), ..UsageRecord::default() }
}
