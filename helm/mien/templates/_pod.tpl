{{/* The pod of the service and of the canary. Takes (dict "root" $ "component" NAME "uri" MODEL_URI). */}}
{{- define "mien.pod" -}}
{{- $v := .root.Values -}}
serviceAccountName: {{ include "mien.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $v.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $v.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if and $v.gpu.enabled $v.gpu.runtimeClassName }}
runtimeClassName: {{ $v.gpu.runtimeClassName }}
{{- end }}
securityContext:
  {{- include "mien.podSecurityContext" .root | nindent 2 }}
# Endpoints first forget the pod (preStop), then it finishes what it accepted (one request's longest time), and leaves.
terminationGracePeriodSeconds: {{ add $v.lifecycle.preStopSeconds ($v.settings.requestTimeout | ceil | int) 15 }}
containers:
  - name: mien
    image: {{ include "mien.image" .root | quote }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    securityContext:
      {{- include "mien.containerSecurityContext" .root | nindent 6 }}
    ports:
      - name: http
        containerPort: 3000
      - name: grpc
        containerPort: 3001
    env:
      - name: MIEN_MODEL
        value: {{ .uri | quote }}
      - name: MIEN_REALM
        value: {{ $v.model.realm | quote }}
      - name: MIEN_GRPC_PORT
        value: "3001"
      {{- if $v.gpu.enabled }}
      - name: MIEN_DEVICE
        value: cuda
      {{- end }}
      {{- if and (kindIs "invalid" $v.settings.cpuThreads) (hasKey $v.resources.limits "cpu") }}
      # torch would count the node's cores.
      - name: MIEN_CPU_THREADS
        valueFrom:
          resourceFieldRef: {containerName: mien, resource: limits.cpu}
      {{- end }}
      {{- /* Whole numbers as such: Go would write 26214400 as 2.62144e+07. */}}
      {{- range $name, $value := $v.settings }}
      {{- if not (kindIs "invalid" $value) }}
      - name: MIEN_{{ snakecase $name | upper }}
        value: {{ if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value | int64 | quote }}{{ else }}{{ $value | toString | quote }}{{ end }}
      {{- end }}
      {{- end }}
      {{- if $v.apiKeys.existingSecret }}
      - name: MIEN_API_KEYS
        value: /etc/mien/keys/keys
      {{- else }}
      # No keys: the NetworkPolicy, and whatever is in front, decide who may call.
      - name: MIEN_INSECURE
        value: "true"
      {{- end }}
      {{- if $v.grpcTls.existingSecret }}
      - name: MIEN_GRPC_TLS_CERT
        value: /etc/mien/tls/tls.crt
      - name: MIEN_GRPC_TLS_KEY
        value: /etc/mien/tls/tls.key
      {{- if $v.grpcTls.clientCertificates }}
      - name: MIEN_GRPC_TLS_CLIENT_CA
        value: /etc/mien/tls/ca.crt
      {{- end }}
      {{- end }}
      {{- if eq $v.model.source "mlflow" }}
      - name: MIEN_MODEL_POLL
        value: {{ $v.model.mlflow.pollSeconds | quote }}
      - name: MLFLOW_TRACKING_URI
        value: {{ $v.model.mlflow.trackingUri | quote }}
      - name: MIEN_CACHE
        value: /cache
      {{- end }}
      {{- if $v.caBundle.existingConfigMap }}
      {{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "AWS_CA_BUNDLE" }}
      - name: {{ . }}
        value: /etc/mien/ca/ca.crt
      {{- end }}
      {{- end }}
      {{- with $v.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- if and (eq $v.model.source "mlflow") (or $v.model.mlflow.existingSecret $v.model.mlflow.existingConfigMap) }}
    envFrom:
      {{- with $v.model.mlflow.existingConfigMap }}
      - configMapRef:
          name: {{ . }}
      {{- end }}
      {{- with $v.model.mlflow.existingSecret }}
      - secretRef:
          name: {{ . }}
      {{- end }}
    {{- end }}
    # Ready means: the weights have the digest that the model's config names, and went through the network once.
    startupProbe:
      httpGet: {path: /readyz, port: http}
      periodSeconds: 2
      timeoutSeconds: {{ $v.probes.timeoutSeconds }}
      failureThreshold: {{ div (add $v.probes.startupSeconds 1) 2 }}
    readinessProbe:
      httpGet: {path: /readyz, port: http}
      periodSeconds: {{ $v.probes.periodSeconds }}
      timeoutSeconds: {{ $v.probes.timeoutSeconds }}
      failureThreshold: 2
    # Slow is not dead: a pod at its limit of CPU answers late, and a restart would take its load to the others.
    livenessProbe:
      httpGet: {path: /healthz, port: http}
      periodSeconds: {{ mul 2 $v.probes.periodSeconds }}
      timeoutSeconds: {{ mul 3 $v.probes.timeoutSeconds }}
      failureThreshold: 6
    lifecycle:
      preStop:
        exec:
          command: [sleep, {{ $v.lifecycle.preStopSeconds | quote }}]
    resources:
      {{- include "mien.resources" .root | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: shm, mountPath: /dev/shm}
      {{- if eq $v.model.source "mlflow" }}
      - {name: cache, mountPath: /cache}
      {{- end }}
      {{- if eq $v.model.source "pvc" }}
      - name: model
        mountPath: /models/mounted
        readOnly: true
        {{- with $v.model.pvc.subPath }}
        subPath: {{ . | quote }}
        {{- end }}
      {{- end }}
      {{- if $v.apiKeys.existingSecret }}
      # The folder, not the file by subPath: only so does a changed Secret reach a running pod.
      - {name: keys, mountPath: /etc/mien/keys, readOnly: true}
      {{- end }}
      {{- if $v.grpcTls.existingSecret }}
      - {name: tls, mountPath: /etc/mien/tls, readOnly: true}
      {{- end }}
      {{- if $v.caBundle.existingConfigMap }}
      - {name: ca, mountPath: /etc/mien/ca, readOnly: true}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {medium: Memory, sizeLimit: {{ $v.memoryVolumes.tmp }}}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $v.memoryVolumes.shm }}}
  {{- if eq $v.model.source "mlflow" }}
  - name: cache
    emptyDir: {medium: Memory, sizeLimit: {{ $v.model.mlflow.cacheSize }}}
  {{- end }}
  {{- if eq $v.model.source "pvc" }}
  - name: model
    persistentVolumeClaim:
      claimName: {{ $v.model.pvc.existingClaim }}
      readOnly: true
  {{- end }}
  {{- if $v.apiKeys.existingSecret }}
  - name: keys
    secret:
      secretName: {{ $v.apiKeys.existingSecret }}
      defaultMode: 0440
      items:
        - key: {{ $v.apiKeys.key }}
          path: keys
  {{- end }}
  {{- if $v.grpcTls.existingSecret }}
  - name: tls
    secret:
      secretName: {{ $v.grpcTls.existingSecret }}
      defaultMode: 0440
  {{- end }}
  {{- if $v.caBundle.existingConfigMap }}
  - name: ca
    configMap:
      name: {{ $v.caBundle.existingConfigMap }}
      items:
        - key: {{ $v.caBundle.key }}
          path: ca.crt
  {{- end }}
{{- $nodeSelector := $v.nodeSelector }}
{{- $tolerations := $v.tolerations }}
{{- if $v.gpu.enabled }}
{{- $nodeSelector = merge (deepCopy $v.gpu.nodeSelector) $v.nodeSelector }}
{{- $tolerations = concat $v.tolerations $v.gpu.tolerations }}
{{- end }}
{{- with $nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $v.topologySpread.enabled }}
topologySpreadConstraints:
  {{- $selector := include "mien.selector" . }}
  {{- range $v.topologySpread.topologyKeys }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: {{ $v.topologySpread.whenUnsatisfiable }}
    # Of this revision's pods alone: the old ones go anyway.
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- $selector | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Takes (dict "root" $ "component" NAME "name" NAME "uri" MODEL_URI "replicas" NUMBER_OR_LEFT_OUT). */}}
{{- define "mien.deployment" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "mien.labels" . | nindent 4 }}
spec:
  {{- if hasKey . "replicas" }}
  replicas: {{ .replicas }}
  {{- end }}
  revisionHistoryLimit: 3
  progressDeadlineSeconds: {{ add .root.Values.probes.startupSeconds 300 }}
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxSurge: 1
      maxUnavailable: 0
  selector:
    matchLabels:
      {{- include "mien.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "mien.labels" . | nindent 8 }}
        {{- with .root.Values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        # A change of these values rolls the pods even where no line of the pod itself changes.
        checksum/values: {{ toJson (pick .root.Values "model" "settings" "apiKeys" "grpcTls" "caBundle") | sha256sum }}
        {{- with .root.Values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      {{- include "mien.pod" . | nindent 6 }}
{{- end }}

{{/* Takes (dict "root" $ "component" NAME "name" NAME "type" TYPE). */}}
{{- define "mien.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "mien.labels" . | nindent 4 }}
  {{- with .root.Values.service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  type: {{ .type }}
  selector:
    {{- include "mien.selector" . | nindent 4 }}
  ports:
    - name: http
      port: {{ .root.Values.service.httpPort }}
      targetPort: http
      appProtocol: http
    - name: grpc
      port: {{ .root.Values.service.grpcPort }}
      targetPort: grpc
      {{- if not .root.Values.grpcTls.existingSecret }}
      appProtocol: kubernetes.io/h2c
      {{- end }}
{{- end }}
