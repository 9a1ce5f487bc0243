"""Routes of the REST API. Routes only."""

from django.urls import include, path
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView

from jobs.api import (
    base_models,
    dataset_images,
    dataset_versions,
    datasets,
    generations,
    images,
    input_images,
    jobs,
    lora_imports,
    loras,
    previews,
    styles,
    trainings,
)

v1 = [
    path("base-models/", base_models.BaseModelListView.as_view(), name="base-models"),
    path("base-models/<uuid:base_model_id>/", base_models.BaseModelView.as_view(), name="base-model"),
    path("datasets/", datasets.DatasetListView.as_view(), name="datasets"),
    path("datasets/<uuid:dataset_id>/", datasets.DatasetView.as_view(), name="dataset"),
    path("datasets/<uuid:dataset_id>/images/", dataset_images.DatasetImageListView.as_view(), name="dataset-images"),
    path("datasets/<uuid:dataset_id>/preprocess/", datasets.DatasetPreprocessView.as_view(), name="dataset-preprocess"),
    path("dataset-images/<uuid:image_id>/", dataset_images.DatasetImageView.as_view(), name="dataset-image"),
    path(
        "dataset-images/<uuid:image_id>/file/", dataset_images.DatasetImageFileView.as_view(), name="dataset-image-file"
    ),
    path("dataset-versions/", dataset_versions.DatasetVersionListView.as_view(), name="dataset-versions"),
    path("dataset-versions/<uuid:version_id>/", dataset_versions.DatasetVersionView.as_view(), name="dataset-version"),
    path("trainings/", trainings.TrainingListView.as_view(), name="trainings"),
    path("trainings/<uuid:training_id>/", trainings.TrainingView.as_view(), name="training"),
    path(
        "trainings/<uuid:training_id>/samples/<str:sha256>/",
        trainings.TrainingSampleView.as_view(),
        name="training-sample",
    ),
    path("generations/", generations.GenerationListView.as_view(), name="generations"),
    path("generations/<uuid:generation_id>/", generations.GenerationView.as_view(), name="generation"),
    path("jobs/", jobs.JobListView.as_view(), name="jobs"),
    path("jobs/<uuid:job_id>/", jobs.JobView.as_view(), name="job"),
    path("jobs/<uuid:job_id>/cancel/", jobs.JobCancelView.as_view(), name="job-cancel"),
    path("jobs/<uuid:job_id>/events/", jobs.JobEventsView.as_view(), name="job-events"),
    path("jobs/<uuid:job_id>/preview/", previews.JobPreviewView.as_view(), name="job-preview"),
    path("lora-imports/", lora_imports.LoraImportListView.as_view(), name="lora-imports"),
    path("lora-imports/<uuid:lora_import_id>/", lora_imports.LoraImportView.as_view(), name="lora-import"),
    path("loras/", loras.LoraListView.as_view(), name="loras"),
    path("loras/<uuid:lora_id>/", loras.LoraView.as_view(), name="lora"),
    path("lora-versions/<uuid:version_id>/file/", loras.LoraVersionFileView.as_view(), name="lora-version-file"),
    path("lora-versions/<uuid:version_id>/peft/", loras.LoraVersionPeftView.as_view(), name="lora-version-peft"),
    path(
        "lora-versions/<uuid:version_id>/diffusers/",
        loras.LoraVersionDiffusersView.as_view(),
        name="lora-version-diffusers",
    ),
    path("images/", images.ImageListView.as_view(), name="images"),
    path("images/<uuid:image_id>/", images.ImageView.as_view(), name="image"),
    path("images/<uuid:image_id>/file/", images.ImageFileView.as_view(), name="image-file"),
    path("input-images/", input_images.InputImageListView.as_view(), name="input-images"),
    path("input-images/<uuid:image_id>/", input_images.InputImageView.as_view(), name="input-image"),
    path("input-images/<uuid:image_id>/file/", input_images.InputImageFileView.as_view(), name="input-image-file"),
    path("styles/", styles.StyleListView.as_view(), name="styles"),
    path("styles/<uuid:style_id>/", styles.StyleView.as_view(), name="style"),
]

urlpatterns = [
    path("v1/", include(v1)),
    # The documents are public, the data is not.
    path("schema/", SpectacularAPIView.as_view(authentication_classes=[], permission_classes=[]), name="schema"),
    path("docs/", SpectacularSwaggerSplitView.as_view(authentication_classes=[], permission_classes=[]), name="docs"),
]
