{{- define "mien.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 50 characters at most, so that the longest suffix fits into a name's 63. */}}
{{- define "mien.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "mien.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "mien.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What a Deployment selects by; it cannot change after the first install, so nothing that may change is in it.
     Takes (dict "root" $ "component" NAME). */}}
{{- define "mien.selector" -}}
app.kubernetes.io/name: {{ include "mien.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "mien.labels" -}}
{{ include "mien.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: mien
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "mien.serviceAccountName" -}}
{{- default (ternary (include "mien.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- define "mien.image" -}}
{{- $image := .Values.image }}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ default .Chart.AppVersion $image.tag }}
{{- end }}
{{- end }}

{{/* A quantity such as 1536Mi or 3Gi, in Mi. The schema lets no other unit through. */}}
{{- define "mien.mebibytes" -}}
{{- if hasSuffix "Gi" . }}{{ mul 1024 (trimSuffix "Gi" . | int) }}{{ else }}{{ trimSuffix "Mi" . | int }}{{ end }}
{{- end }}

{{/* Mi in memory volumes. What lies in them counts against the container's limit. */}}
{{- define "mien.memoryVolumes" -}}
{{- $sum := add (include "mien.mebibytes" .Values.memoryVolumes.tmp) (include "mien.mebibytes" .Values.memoryVolumes.shm) }}
{{- if eq .Values.model.source "mlflow" }}{{ $sum = add $sum (include "mien.mebibytes" .Values.model.mlflow.cacheSize) }}{{ end }}
{{- $sum }}
{{- end }}

{{- define "mien.resources" -}}
{{- $volumes := include "mien.memoryVolumes" . | int }}
{{- $requests := deepCopy .Values.resources.requests }}
{{- $limits := deepCopy .Values.resources.limits }}
{{- $_ := set $requests "memory" (printf "%dMi" (add $volumes (include "mien.mebibytes" $requests.memory))) }}
{{- $_ := set $limits "memory" (printf "%dMi" (add $volumes (include "mien.mebibytes" $limits.memory))) }}
{{- if .Values.gpu.enabled }}
{{- $_ := set $limits .Values.gpu.resource .Values.gpu.count }}
{{- $_ := set $requests .Values.gpu.resource .Values.gpu.count }}
{{- end }}
{{- toYaml (dict "requests" $requests "limits" $limits) }}
{{- end }}

{{/* Restricted Pod Security, with the ids that the cluster wants to choose left out. */}}
{{- define "mien.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ . }}
{{- end }}
{{- with .Values.podSecurity.runAsGroup }}
runAsGroup: {{ . }}
{{- end }}
{{- with .Values.podSecurity.fsGroup }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "mien.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* What the schema cannot say: values that exclude or need one another. */}}
{{- define "mien.check" -}}
{{- $v := .Values }}
{{- if and $v.autoscaling.hpa.enabled $v.autoscaling.keda.enabled }}
{{- fail "autoscaling.hpa.enabled and autoscaling.keda.enabled exclude each other: KEDA makes an HPA of its own, and two of them fight over one Deployment. Enable one." }}
{{- end }}
{{- if and $v.autoscaling.keda.enabled (not $v.autoscaling.keda.prometheusAddress) }}
{{- fail "autoscaling.keda.enabled needs autoscaling.keda.prometheusAddress, for example http://prometheus-operated.monitoring:9090" }}
{{- end }}
{{- if gt ($v.autoscaling.minReplicas | int) ($v.autoscaling.maxReplicas | int) }}
{{- fail (printf "autoscaling.minReplicas (%v) is larger than autoscaling.maxReplicas (%v)" $v.autoscaling.minReplicas $v.autoscaling.maxReplicas) }}
{{- end }}
{{- if and $v.autoscaling.gpuUtilization.enabled (not $v.gpu.enabled) }}
{{- fail "autoscaling.gpuUtilization.enabled needs gpu.enabled" }}
{{- end }}
{{- if and (eq $v.model.source "pvc") (not $v.model.pvc.existingClaim) }}
{{- fail "model.source=pvc needs model.pvc.existingClaim, the PersistentVolumeClaim with the model's folder" }}
{{- end }}
{{- if and (eq $v.model.source "mlflow") (not $v.model.mlflow.trackingUri) }}
{{- fail "model.source=mlflow needs model.mlflow.trackingUri, for example http://mlflow.mlflow:5000" }}
{{- end }}
{{- if and $v.canary.enabled (ne $v.model.source "mlflow") }}
{{- fail "canary.enabled needs model.source=mlflow: a canary follows another alias of the registry" }}
{{- end }}
{{- if and $v.canary.enabled (eq $v.canary.uri $v.model.mlflow.uri) }}
{{- fail (printf "canary.uri and model.mlflow.uri are both %s: the canary would serve the same model" $v.canary.uri) }}
{{- end }}
{{- if and $v.canary.enabled (gt ($v.canary.weight | int) 0) (not (or $v.gateway.enabled $v.ingress.enabled)) }}
{{- fail "canary.weight needs gateway.enabled or ingress.enabled (nginx): a Service alone cannot divide requests by weight. Set canary.weight to 0 to reach the canary by its own Service." }}
{{- end }}
{{- if and $v.ingress.enabled (not $v.ingress.host) }}
{{- fail "ingress.enabled needs ingress.host" }}
{{- end }}
{{- if and $v.ingress.grpc.enabled (not (and $v.ingress.enabled $v.ingress.grpc.host)) }}
{{- fail "ingress.grpc.enabled needs ingress.enabled and ingress.grpc.host" }}
{{- end }}
{{- if and $v.gateway.enabled (not $v.gateway.parentRefs) }}
{{- fail "gateway.enabled needs gateway.parentRefs, the Gateways that the routes hang on" }}
{{- end }}
{{- if $v.gateway.grpc.enabled }}
{{- if not (and $v.gateway.enabled $v.gateway.hostnames $v.gateway.grpc.hostnames) }}
{{- fail "gateway.grpc.enabled needs gateway.enabled, gateway.hostnames and gateway.grpc.hostnames: a listener accepts one kind of route for a host name, so HTTP and gRPC need different ones" }}
{{- end }}
{{- range $v.gateway.grpc.hostnames }}
{{- if has . $v.gateway.hostnames }}
{{- fail (printf "%s is in gateway.hostnames and in gateway.grpc.hostnames: a listener would accept only one of the two routes" .) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (or $v.ingress.enabled $v.gateway.enabled (ne $v.service.type "ClusterIP")) (not $v.apiKeys.existingSecret) (not $v.apiKeys.allowAnonymous) }}
{{- fail "an Ingress, a Gateway route or a Service other than ClusterIP leads here from outside the cluster, and there are no API keys: set apiKeys.existingSecret, or apiKeys.allowAnonymous=true if something in front asks who is calling" }}
{{- end }}
{{- if and $v.grpcTls.clientCertificates (not $v.grpcTls.existingSecret) }}
{{- fail "grpcTls.clientCertificates needs grpcTls.existingSecret, with ca.crt beside tls.crt and tls.key" }}
{{- end }}
{{- if $v.serviceAccount.create }}{{- else if not $v.serviceAccount.name }}
{{- fail "serviceAccount.create=false needs serviceAccount.name" }}
{{- end }}
{{- end }}
